#!/bin/sh
# Installs the library into a temporary prefix, builds examples/cmake_consumer against the installed
# package and once more with add_subdirectory, and runs both.
#   tests/install/install_test.sh [BUILD_DIR]   installs from BUILD_DIR; default: a fresh build
set -eu

source_dir=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
jobs=${SONICMOE_JOBS:-2}

build=${1:-}
if [ -z "$build" ]; then
  build=$work/library
  cmake -S "$source_dir" -B "$build" -DSONICMOE_BUILD_TESTS=OFF >"$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
  cmake --build "$build" -j"$jobs" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
fi
cmake --install "$build" --prefix "$work/prefix" >/dev/null

run() { # run NAME CMAKE_ARGUMENTS...: build and run the consumer
  name=$1
  shift
  cmake -S "$source_dir/examples/cmake_consumer" -B "$work/$name" -DCMAKE_BUILD_TYPE=Release "$@" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  cmake --build "$work/$name" -j"$jobs" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  echo "$name: $("$work/$name/train_step")"
}

run find_package -DCMAKE_PREFIX_PATH="$work/prefix"
run add_subdirectory -DSONICMOE_SOURCE_DIR="$source_dir"
# The installed command runs from where it was put.
"$work/prefix/bin/sonicmoe" info --json >/dev/null
echo "installed command: ok"
