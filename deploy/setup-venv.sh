#!/usr/bin/env bash
# Create the virtual environment $1 with the Python $2 and install Herald, editable, with its development tools.
set -euo pipefail
venv=$1 python=$2

if ! command -v "$python" >/dev/null; then
  echo "Herald needs Python 3.11 and there is no '$python' here: install it, or run make PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if ! "$python" -m venv "$venv" 2>/dev/null; then
  # Debian and Ubuntu split venv off
  source "$(dirname "$0")/apt.sh"
  apt_install python3.11-venv || apt_install python3-venv
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --quiet --editable '.[dev]'
