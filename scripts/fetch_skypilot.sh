#!/usr/bin/env bash
# Installs SkyPilot, which `tests/launch` lets read our task file, into an environment of its own: it asks for other
# versions of what we use too. About 420 MB in JAXDISTILL_CACHE (default ~/.cache/jaxdistill); a second call does
# nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${JAXDISTILL_CACHE:-$HOME/.cache/jaxdistill}/skypilot-0.14.1
[[ -x $folder/bin/sky ]] && exit # written last
echo "fetch_skypilot: installing into $folder (a minute)" >&2
.venv/bin/python -I -m venv --clear "$folder"
"$folder/bin/python" -I -m pip install -qq --no-input --disable-pip-version-check skypilot==0.14.1
