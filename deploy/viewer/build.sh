#!/usr/bin/env bash
# Fetch the volume viewer as package-lock.json names it, and put it with its licences where the web UI serves it.
set -euo pipefail
cd "$(dirname "$0")"
vendor=../../webui/static/vendor

npm ci --ignore-scripts --omit=optional --no-audit --no-fund
mkdir -p "$vendor"
{
  echo "# NiiVue"
  cat niivue-license.md
  find node_modules -iname 'licen[cs]e*' -type f | sort | while read -r licence; do
    printf '\n# %s\n\n' "$(dirname "${licence#node_modules/}")"
    cat "$licence"
  done
} >"$vendor/niivue.licences.md"
# last, and by renaming: the page believes that the viewer is there when this file is
cp node_modules/@niivue/niivue/dist/index.js "$vendor/niivue.js.new"
mv "$vendor/niivue.js.new" "$vendor/niivue.js"
