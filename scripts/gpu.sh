#!/usr/bin/env bash
# Builds and runs what needs a GPU of compute capability 9.0.
#   scripts/gpu.sh build [name...]        compile the Hopper experiments into build-cuda/
#   scripts/gpu.sh experiments [name...]  run them (building what is missing), each under a time limit
#   scripts/gpu.sh test                   all tests that need the GPU: library, router, Python package
#   scripts/gpu.sh bench [args...]        bench/layer.py: this library, torch grouped_mm, cuBLAS
#   scripts/gpu.sh cases [args...]        bench/cases.py: limits, skew, rounding, routing
#   scripts/gpu.sh power [case]           energy of each product alone, beside cuBLAS (m5_grouped_gemm power)
#   scripts/gpu.sh train DATA [args...]   bench/train.py on DATA, all systems, over the GPUs there are
# test, bench, cases and train use the binaries of `make build` (or of SONICMOE_BUILD, another build directory).
# Output goes to $OUT if set, else build-cuda/out: one log per program and rows.jsonl, a JSON object
# per measured row.
set -u -o pipefail
cd "$(dirname "$0")/.."
readonly experiments_dir=lab
readonly build=build-cuda
readonly out=${OUT:-$build/out}
[ "${1:-}" = test ] && default_limit=300 || default_limit=60  # seconds per program
readonly time_limit=${SONICMOE_TIME_LIMIT:-$default_limit}

all_experiments() { (cd "$experiments_dir" && ls m*.cu | sed 's/\.cu$//'); }

# A spill, or registers that setmaxnreg cannot move, fail the build.
build_one() {
  mkdir -p "$build"
  local library=()
  case "$1" in
    m5_*|m6_*)  # they time the library itself
      cmake -S . -B "$build/lib" -DCMAKE_BUILD_TYPE=Release -DSONICMOE_ONEDNN=OFF \
        -DSONICMOE_BUILD_TESTS=OFF -DSONICMOE_BUILD_CLI=OFF >"$build/cmake.log" 2>&1 &&
        cmake --build "$build/lib" -j "$(nproc)" >>"$build/cmake.log" 2>&1 ||
        { tail -20 "$build/cmake.log"; return 1; }
      library=("$build/lib/src/libsonicmoe.a" -lgomp)
      ;;
  esac
  nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a \
    -Xptxas=--warn-on-spills,--warning-as-error -Iinclude -Isrc "-I$experiments_dir" \
    "$experiments_dir/$1.cu" -o "$build/$1" "${library[@]}" -ldl
}

build() {
  local name failed=0
  for name in ${*:-$(all_experiments)}; do build_one "$name" || failed=1; done
  return $failed
}

# The cuBLAS to compare with: the one PyTorch brings, else the toolkit's.
find_cublas() {
  python3 - <<'PY' 2>/dev/null
import glob, importlib.util, os
roots = [p for name in ("nvidia", "torch") if (spec := importlib.util.find_spec(name))
         for p in (spec.submodule_search_locations or [])]
roots.append("/usr/local/cuda")
found = [f for r in roots for f in glob.glob(os.path.join(r, "**", "libcublas.so.1*"), recursive=True)]
print(found[0] if found else "")
PY
}

# run_one NAME COMMAND...: runs it under the time limit, keeps its log, collects its rows.
run_one() {
  local name=$1 status
  shift
  timeout "$time_limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  grep -E "^FAIL|^[0-9]+ checks failed|rror|wait did not end|no cuBLAS" "$out/$name.log" | grep -v "^ok" | head -20
  grep "^ROW" "$out/$name.log" | sed 's/^ROW //' >>"$out/rows.jsonl"
  echo "$name: exit $status, $(grep -c '^ok' "$out/$name.log") checks passed," \
    "$(grep -c '^ROW' "$out/$name.log") rows, ${SECONDS} s since the start"
  return $status
}

run_experiments() {
  local name failed=0
  mkdir -p "$out"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu \
    --format=csv | tee "$out/device.csv"
  export SONICMOE_CUBLAS=${SONICMOE_CUBLAS:-$(find_cublas)}
  echo "cuBLAS: $SONICMOE_CUBLAS"
  for name in ${*:-torch_bmm $(all_experiments)}; do
    echo "== $name"
    if [ -f "$experiments_dir/$name.py" ]; then
      run_one "$name" python3 "$experiments_dir/$name.py" || failed=1
      continue
    fi
    # A binary built against another system's libraries does not start: rebuild it here.
    if ! ldd "$build/$name" >/dev/null 2>&1 || ldd "$build/$name" | grep -q "not found"; then
      build_one "$name" || { failed=1; continue; }
    fi
    run_one "$name" "$build/$name" || failed=1
  done
  python3 "$experiments_dir/show_rows.py" "$out/rows.jsonl"
  return $failed
}

# A Python whose torch sees the GPU.
find_python() {
  local python candidates=(python3 .venv/bin/python)
  [ -n "${SONICMOE_PYTHON:-}" ] && candidates=("$SONICMOE_PYTHON")
  for python in "${candidates[@]}"; do
    "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && { echo "$python"; return; }
  done
  echo "scripts/gpu.sh: no Python here has a torch that sees a GPU (SONICMOE_PYTHON names one)" >&2
  return 1
}

run_tests() {
  local failed=0 tests=${SONICMOE_BUILD:-build}/tests python
  if ! "${SONICMOE_BUILD:-build}/cli/sonicmoe" info | grep -q '^cuda  *on'; then
    echo "scripts/gpu.sh: the CUDA backend is off here: ${SONICMOE_BUILD:-build}/cli/sonicmoe info says why" >&2
    return 1
  fi
  python=$(find_python) || return 1
  mkdir -p "$out"
  run_one ops "$tests/sonicmoe_ops_tests" --gtest_brief=1 --gtest_filter='*cuda*' || failed=1
  SONICMOE_BACKEND=cuda run_one unit "$tests/sonicmoe_unit_tests" --gtest_brief=1 || failed=1
  run_one fuzz "$tests/sonicmoe_fuzz" --cases 1000 || failed=1
  run_one python "$python" -m pytest -q --timeout 300 tests/torch/test_cuda.py || failed=1
  tail -n 3 "$out"/{ops,unit,fuzz,python}.log
  return $failed
}

case "${1:-}" in
  build) shift; build "$@" ;;
  experiments) shift; run_experiments "$@" ;;
  test) run_tests ;;
  bench|cases)
    [ "$1" = cases ] && script=bench.cases || script=bench.layer
    shift
    python=$(find_python) && PYTHONPATH=bindings/torch "$python" -m "$script" "$@"
    ;;
  power)
    build_one m5_grouped_gemm || exit 1
    SONICMOE_CUBLAS=${SONICMOE_CUBLAS:-$(find_cublas)} "$build/m5_grouped_gemm" "$@"
    ;;
  train)
    python=$(find_python) || exit 1
    data=${2:?which tokens? A .bin of trainer.prepare: docs/guide/training.md}
    shift 2
    mkdir -p "$out"
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    PYTHONPATH=bindings/torch "$python" -m bench.train --data "$data" --gpus "$gpus" --loss-steps 200 --limit 200 --deadline 2600 \
      --output "$out/train.json" "$@" 2>&1 | tee "$out/train.log"
    ;;
  *) sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
