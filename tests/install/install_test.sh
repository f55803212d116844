#!/bin/sh
# Unpacks the archive of `make package`, builds examples/cmake_consumer against it and once more with
# add_subdirectory, there without oneDNN, and runs both.
#   tests/install/install_test.sh BUILD_DIR   the folder that holds the archive
set -eu

source_dir=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
jobs=${SONICMOE_JOBS:-2}

build=${1:?usage: install_test.sh BUILD_DIR}
mkdir "$work/prefix"
tar -xzf "$build"/sonicmoe-*.tar.gz -C "$work/prefix" --strip-components=1
test -f "$work"/prefix/share/doc/sonicmoe/LICENSE

run() { # run NAME CMAKE_ARGUMENTS...: build and run the consumer
  name=$1
  shift
  cmake -S "$source_dir/examples/cmake_consumer" -B "$work/$name" -DCMAKE_BUILD_TYPE=Release "$@" \
    >"$work/$name.configured" 2>&1 || { cat "$work/$name.configured"; exit 1; }
  cmake --build "$work/$name" -j"$jobs" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  "$work/$name/train_step" >"$work/$name.out" 2>"$work/$name.err"
  echo "$name: $(cat "$work/$name.out")"
}

run find_package -DCMAKE_PREFIX_PATH="$work/prefix"
# Quickly compiled: this one is not asked how fast it is.
run add_subdirectory -DSONICMOE_SOURCE_DIR="$source_dir" -DCMAKE_DISABLE_FIND_PACKAGE_dnnl=ON \
  -DSONICMOE_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG"
# Nobody computes on the slow reference unawares: the build says so, and the first call, once.
grep -q "NO ONEDNN" "$work/add_subdirectory.configured"
[ "$(grep -c "40 times slower" "$work/add_subdirectory.err")" = 1 ]
[ ! -s "$work/find_package.err" ]
# The installed command runs from where it was put.
"$work/prefix/bin/sonicmoe" info --json >/dev/null
echo "installed command: ok"
