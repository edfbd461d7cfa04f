"""`herald send`: folders, files and patients of public sets over a real association."""

import json
from pathlib import Path

import numpy as np
import pytest
from real_data import DATA, needs_real_data
from receiver_fakes import config_under, ct_series, receiving
from typer.testing import CliRunner

from herald.cli import app
from herald.errors import ConfigError
from herald.volume import read_datasets, volume_from_datasets
from serving.readers import SETS, named_patients


def sent(what: str, port: int) -> tuple[int, dict[str, list[str]]]:
    result = CliRunner().invoke(app, ["send", what, "--to", f"HERALD@127.0.0.1:{port}", "--data", str(DATA), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_folder_of_files_is_sent_and_each_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(ct_series(3)):
        image.save_as(folder / f"{i}.dcm", enforce_file_format=True)
    (folder / "notes.txt").write_text("not an image")
    with receiving(config_under(tmp_path / "node")) as receiver:
        code, told = sent(str(folder), receiver.port)
    assert code == 1
    assert [Path(path).name for path in told["stored"]] == ["0.dcm", "1.dcm", "2.dcm"]
    assert list(told["failed"]) == [str(folder / "notes.txt")]


@needs_real_data
@pytest.mark.parametrize("what", ["ct-ich-v1:051", "phe-sich:0002"])
def test_a_patient_of_a_public_set_arrives_as_one_series_and_again_as_the_same(tmp_path: Path, what: str) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        code, told = sent(what, receiver.port)
        code_again, told_again = sent(what, receiver.port)
    assert (code, code_again) == (0, 0)
    assert len(told["series_instance_uids"]) == 1
    assert told_again["series_instance_uids"] == told["series_instance_uids"]
    stored = sorted((tmp_path / "store").rglob("*.dcm"))
    assert len(stored) == len(told["stored"]) > 20
    (patient,) = named_patients(what, DATA)
    real = SETS[patient.source][2](patient.folder, patient.patient).volume
    assert np.array_equal(volume_from_datasets(read_datasets(stored)).hounsfield, real.hounsfield)


def test_what_is_neither_file_nor_patient_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no file, no folder and no patient"):
        sent("nowhere", 1)
