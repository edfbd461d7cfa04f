"""Configuration: precedence, clear errors, secrets, and that deploy/herald.toml lists everything."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest

from herald.config import SECRETS, Config, load_config, required_secret
from herald.errors import ConfigError

REFERENCE = Path(__file__).parent.parent / "deploy" / "herald.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "herald.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_file_and_environment_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {})
    assert config.receiver.port == 11112
    assert config.notifier.mode == "shadow"
    assert config.store.root == tmp_path / "herald-data" / "store"
    assert config.bus.url == f"sqlite:///{tmp_path}/herald-data/bus.sqlite"


def test_the_environment_overrides_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[receiver]\nport = 104\nae_title = "FILE"\n')
    config = load_config(path, {"HERALD_RECEIVER__AE_TITLE": "ENV"})
    assert (config.receiver.port, config.receiver.ae_title) == (104, "ENV")


def test_environment_text_becomes_the_type_of_the_setting(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, ""),
        {
            "HERALD_RECEIVER__ALLOWED_SENDERS": "CT1, CT2",
            "HERALD_NOTIFIER__SMTP_STARTTLS": "true",
            "HERALD_ROUTER__OPERATING_POINT": "0.25",
            "HERALD_NOTIFIER__STEPS": '[{"to": "a@b.example", "after_minutes": 5}]',
        },
    )
    assert config.receiver.allowed_senders == ("CT1", "CT2")
    assert config.notifier.smtp_starttls is True
    assert config.router.operating_point == 0.25
    assert (config.notifier.steps[0].to, config.notifier.steps[0].after_minutes) == ("a@b.example", 5.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[receiver]\nprot = 1\n", "unknown setting receiver.prot; did you mean port"),
        ("[reciever]\nport = 1\n", "unknown table reciever; did you mean receiver"),
        ("[[notifier.steps]]\nwho = 'x'\n", "unknown setting notifier.steps.who; did you mean to"),
        ("[receiver]\nport = 'x'\n", "receiver.port"),
        ("[notifier]\nmode = 'loud'\n", "notifier.mode"),
        ("port = 1\n", "outside a table"),
        ("[receiver", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_name_of_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(write(tmp_path, text), {})


def test_an_unknown_setting_in_the_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean port"):
        load_config(write(tmp_path, ""), {"HERALD_RECEIVER__PORTS": "1"})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml", {})


def test_a_secret_is_read_from_the_file_that_the_setting_names(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n", encoding="utf-8")
    config = load_config(write(tmp_path, f'[node]\ndata_dir = "{tmp_path}"\n[webui]\ntoken = "file:token"\n'), {})
    assert config.webui.token == "abc"


def test_a_missing_secret_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"webui\.token: cannot read the secret file"):
        load_config(write(tmp_path, '[webui]\ntoken = "file:/no/such/file"\n'), {})


@pytest.mark.parametrize(("table", "key"), SECRETS)
def test_a_secret_has_no_default_and_its_absence_says_how_to_give_it(table: str, key: str) -> None:
    assert getattr(getattr(Config(), table), key) == ""
    with pytest.raises(ConfigError, match=f"HERALD_{table}__{key}".upper()):
        required_secret("", f"{table}.{key}")


def test_the_reference_file_lists_every_setting_with_its_default() -> None:
    listed = tomllib.loads(REFERENCE.read_text(encoding="utf-8"))
    assert listed == msgspec.json.decode(msgspec.json.encode(Config(), enc_hook=str))


def test_the_reference_file_explains_every_setting_and_its_unit() -> None:
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    for table in fields(Config):
        for setting in fields(getattr(Config(), table.name)):
            line = next(line for line in lines if line.startswith(f"{setting.name} = "))
            comment = line.partition("#")[2]
            assert len(comment.split()) >= 1, f"{table.name}.{setting.name} has no comment"
            for suffix, unit in (
                ("_s", "second"),
                ("_mm", "mm"),
                ("_bytes", "bytes"),
                ("_gb", "GB"),
                ("_hours", "hours"),
            ):
                if setting.name.endswith(suffix):
                    assert unit in comment, f"{table.name}.{setting.name} does not state its unit"
