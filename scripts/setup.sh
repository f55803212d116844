#!/usr/bin/env bash
# Installs what a build, the tests and training need: Debian packages (as root; otherwise it names
# them) and a Python environment. Usage: scripts/setup.sh VENV
set -euo pipefail
venv=${1:-.venv}
packages=(g++ cmake ninja-build libdnnl-dev libgtest-dev libgmock-dev libcli11-dev
          nlohmann-json3-dev python3-venv)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "setup: installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
  else
    echo "setup: please install: ${missing[*]}" >&2
    echo "setup: for example: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
# Not bin/pip, whose first line cannot name every folder.
"$venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$venv/bin/python" -m pip install -q --disable-pip-version-check -r requirements.txt
