#!/usr/bin/env bash
# The Debian packages (scripts/system.sh) and the Python environment that a build, the tests and
# training need. Usage: scripts/setup.sh VENV
set -euo pipefail
venv=${1:-.venv}
bash "$(dirname "$0")/system.sh"

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
# Not bin/pip, whose first line cannot name every folder.
install=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
"${install[@]}" --no-deps --require-hashes -r requirements.txt
"${install[@]}" "$(grep '^torch==' requirements.in)"  # whichever build pip finds: see requirements.in
