#!/usr/bin/env bash
# The Debian packages (scripts/system.sh) and the Python environment that a build, the tests and
# training need. Usage: scripts/setup.sh VENV
set -euo pipefail
venv=${1:-.venv}
bash "$(dirname "$0")/system.sh"

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
# Not bin/pip, whose first line cannot name every folder.
"$venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r requirements.txt
