#!/usr/bin/env bash
# Install what the tests need beside Python, only what is missing: Java and Maven (Kafka), PostgreSQL, Chromium, dcmtk.
# setup-tools.sh PLAYWRIGHT: on Ubuntu, where apt has Chromium only as a snap, that command installs its own.
set -euo pipefail
playwright=$1
source "$(dirname "$0")/apt.sh"

missing=()
command -v java >/dev/null || missing+=(default-jre-headless)
command -v mvn >/dev/null || missing+=(maven)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
command -v storescu >/dev/null || missing+=(dcmtk)
command -v openssl >/dev/null || missing+=(openssl)
if ! command -v chromium >/dev/null; then
  if ! grep -q '^ID=ubuntu$' /etc/os-release; then
    missing+=(chromium)
  elif ! "$playwright" install --dry-run chromium | awk '/Install location:/ { print $3 }' | xargs -n 1 test -d; then
    echo "installing Playwright's Chromium"
    "$playwright" install --with-deps chromium
  fi
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}"
  apt_install "${missing[@]}"
fi
