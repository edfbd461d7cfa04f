"""`herald init`: what a new node needs before its first run."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from herald.errors import ConfigError

TOKEN_BYTES = 32

CONFIG = """\
# Herald. Every setting with its default and unit: deploy/herald.toml in the source.
[node]
data_dir = "{data_dir}"

[notifier]
mode = "shadow"                     # "live" sends pages

# [[notifier.steps]]                # whom to page first
# to = "oncall@hospital.example"
# channel = "smtp"

[webui]
token = "file:secrets/webui-token"
secret_key = "file:secrets/webui-secret-key"

[validation]
salt = "file:secrets/validation-salt"
"""
"""Only what a site decides; everything else keeps its default."""


def initialise(folder: Path, new_secret: Callable[[int], str]) -> Iterator[tuple[Path, str]]:
    """Create herald.toml, secrets and models under `folder`; yields each path with what was done."""
    data_dir = folder.absolute() / "herald-data"
    secrets = data_dir / "secrets"
    secrets.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("webui-token", "webui-secret-key", "validation-salt"):
        yield _write_once(secrets / name, new_secret(TOKEN_BYTES) + "\n", mode=0o600)
    yield _write_once(folder / "herald.toml", CONFIG.format(data_dir=data_dir), mode=0o644)
    models = data_dir / "models"
    done = subprocess.run(
        [sys.executable, "-m", "serving.export", "--out", str(models)], stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise ConfigError(f"python -m serving.export --out {models} failed; its message is above")
    yield models, "models"


def _write_once(path: Path, text: str, mode: int) -> tuple[Path, str]:
    if path.exists():
        return path, "kept"
    path.touch(mode=mode)
    path.write_text(text, encoding="utf-8")
    return path, "written"
