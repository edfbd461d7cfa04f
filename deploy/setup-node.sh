#!/usr/bin/env bash
# Install Node.js and npm, which fetch the volume viewer, only when they are missing.
set -euo pipefail
source "$(dirname "$0")/apt.sh"

if ! command -v npm >/dev/null; then
  echo "installing nodejs npm"
  apt_install nodejs npm
fi
