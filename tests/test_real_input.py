"""The main job on real CT: `herald demo --once --json` on ../shared/data, as stored and with headers blanked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import generate_uid
from real_data import DATA, needs_real_data

from serving.dicom_writer import Origin, seeded_uid, write_dicom_series
from serving.public_sets import read_cranium

SERIES = ("ge-head", "philips-phantom/localizer", "philips-phantom/soft-5mm", "philips-phantom/bone-1mm", "lidc-body")
SCREENS = "philips-phantom/exam-summary"
TELLING = ("ConvolutionKernel", "ContrastBolusAgent", "BodyPartExamined", "SeriesDescription", "ProtocolName")
pytestmark = [needs_real_data, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the demonstration says of every real series, by folder name; `NAME blank` is the copy without headers."""
    folder = tmp_path_factory.mktemp("real")
    names = {}
    for series in (*SERIES, SCREENS):
        for number, path in enumerate(sorted(p for p in (DATA / series).iterdir() if p.is_file())):
            ds = dcmread(path)
            names[str(ds.SeriesInstanceUID)] = series
            ds.save_as(folder / f"{series.replace('/', '-')}-{number}.dcm")
            ds.SeriesInstanceUID = generate_uid(entropy_srcs=[ds.SeriesInstanceUID, "blank"])
            names[str(ds.SeriesInstanceUID)] = f"{series} blank"
            ds.SOPInstanceUID = generate_uid(entropy_srcs=[ds.SOPInstanceUID, "blank"])
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            for keyword in TELLING:
                if keyword in ds:
                    ds[keyword].value = None
            ds.save_as(folder / f"{series.replace('/', '-')}-{number}-blank.dcm")
    names[str(write_cranium(folder / "cranium"))] = "cranium"
    command = [sys.executable, "-m", "herald", "demo", "--once", "--json", "--dicom", str(folder)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HERALD_")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    answer = json.loads(done.stdout)
    assert answer["url"].startswith("http://")
    return {names[one["series_instance_uid"]]: one for one in answer["series"]}


def write_cranium(folder: Path) -> str:
    """The thin-slice head of another scanner as DICOM; returns its SeriesInstanceUID."""
    volume = read_cranium(DATA / "volumes" / "cranium.nii.gz")
    origin = Origin(study="cranium", series="1", slice_thickness_mm=volume.slice_spacing_mm, derived=True)
    write_dicom_series(volume, folder, origin)
    return seeded_uid(origin.study, origin.series)


def test_every_real_series_has_its_disposition(told: dict[str, Any]) -> None:
    twice = {f"{series}{variant}" for series in (*SERIES, SCREENS) for variant in ("", " blank")}
    assert set(told) == {*twice, "cranium"}


def test_thin_slices_of_a_real_head_without_a_bleed_are_negative(told: dict[str, Any]) -> None:
    assert told["cranium"]["disposition"] == "negative"
    assert not told["cranium"]["uncertain"]


@pytest.mark.parametrize("variant", ["", " blank"])
def test_the_real_head_is_recognised_and_goes_through_detection(told: dict[str, Any], variant: str) -> None:
    head = told["ge-head" + variant]
    labels = {name: answer["label"] for name, answer in head["protocol"].items()}
    assert labels == {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}
    assert head["disposition"] in ("negative", "positive")
    assert {finding["kind"] for finding in head["findings"]} >= {"any", "iph", "sah", "edh_sdh"}
    assert head["latency_s"]["detect"] > 0
    assert any("gantry tilt" in note for note in head["notes"])


def test_the_real_head_without_a_bleed_is_negative(told: dict[str, Any]) -> None:
    assert told["ge-head"]["disposition"] == "negative"


@pytest.mark.parametrize("variant", ["", " blank"])
@pytest.mark.parametrize(
    ("series", "reason"),
    [("philips-phantom/localizer", "localizer"), (SCREENS, "not a CT image")],
)
def test_scouts_and_screens_are_not_eligible_without_a_model_call(
    told: dict[str, Any], series: str, reason: str, variant: str
) -> None:
    one = told[series + variant]
    assert one["disposition"] == "not_eligible"
    assert one["reasons"][0].startswith(reason)
    assert one["protocol"] is None


@pytest.mark.parametrize(("variant", "claim"), [("", "bone"), (" blank", None)])
def test_the_bone_kernel_is_seen_in_the_pixels_with_the_header_beside_it(
    told: dict[str, Any], variant: str, claim: str | None
) -> None:
    bone = told["philips-phantom/bone-1mm" + variant]
    assert bone["disposition"] == "not_eligible"
    assert bone["protocol"]["kernel"]["label"] == "bone"
    assert any(reason.startswith("kernel: bone kernel") for reason in bone["reasons"])
    assert bone["header"]["kernel"] == claim


@pytest.mark.parametrize("variant", ["", " blank"])
def test_the_same_object_in_a_soft_kernel_is_soft(told: dict[str, Any], variant: str) -> None:
    assert told["philips-phantom/soft-5mm" + variant]["protocol"]["kernel"]["label"] == "soft"


@pytest.mark.parametrize("variant", ["", " blank"])
def test_a_body_is_not_a_head(told: dict[str, Any], variant: str) -> None:
    body = told["lidc-body" + variant]
    assert body["disposition"] == "not_eligible"
    assert any(reason.startswith("region: not a head") for reason in body["reasons"])


@pytest.mark.parametrize("series", SERIES)
def test_blank_headers_change_no_decision(told: dict[str, Any], series: str) -> None:
    with_headers, blank = told[series], told[f"{series} blank"]
    assert blank["disposition"] == with_headers["disposition"]
    assert blank["uncertain"] == with_headers["uncertain"]
    assert blank["protocol"] == with_headers["protocol"]
