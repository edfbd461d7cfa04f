#!/usr/bin/env bash
# Install what the tests need beside Python, only what is missing: Java and Maven (Kafka), PostgreSQL, Chromium, dcmtk.
set -euo pipefail
source "$(dirname "$0")/apt.sh"

missing=()
command -v java >/dev/null || missing+=(default-jre-headless)
command -v mvn >/dev/null || missing+=(maven)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
command -v chromium >/dev/null || missing+=(chromium)
command -v storescu >/dev/null || missing+=(dcmtk)
command -v openssl >/dev/null || missing+=(openssl)
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}"
  apt_install "${missing[@]}"
fi
