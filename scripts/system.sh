#!/usr/bin/env bash
# The Debian packages that a build needs.
#   scripts/system.sh           names those that are missing
#   scripts/system.sh install   installs them, as root (`make system`); so does SONICMOE_APT=1
# Exit code 1 where some stay missing. Nothing is installed unasked.
set -euo pipefail
packages=(g++ cmake ninja-build libdnnl-dev libgtest-dev libgmock-dev libcli11-dev
          nlohmann-json3-dev python3-venv)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
((${#missing[@]})) || exit 0
echo "setup: missing Debian packages: ${missing[*]}" >&2

as_root=
[[ $(id -u) -eq 0 ]] || as_root="sudo "
asked=
[[ ${1:-} != install && ${SONICMOE_APT:-} != 1 ]] || asked=yes
if [[ ! $asked || $as_root ]]; then
  echo "setup: nothing was installed. This installs them: ${as_root}make system" >&2
  echo "setup: the same by hand: ${as_root}apt-get install ${missing[*]}" >&2
  exit 1
fi
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"
