# The front door. `make system`, as root and once, installs the Debian packages that are missing.
# Every other target works from a bare clone and keeps to it, unless SONICMOE_APT=1 lets it install
# them.  make train [ARGS="--steps 200"]    make test    make bench    make compare
SHELL := /bin/bash
BUILD ?= build
PYTHON ?= python3
JOBS ?= $(shell nproc)
VENV := .venv
# For the shell, which knows the folder's whole name whatever it holds (blanks, quotes, $).
PY := "$$PWD/$(VENV)/bin/python"
GPU_PYTHON ?= $(PY)
FUZZ_CASES ?= 100000
ARGS ?=

# Spinning OpenMP threads starve the other processes of a small or busy machine.
export OMP_WAIT_POLICY ?= passive
export PYTHONPATH := $(CURDIR)/bindings/torch:$(CURDIR)

.PHONY: all system setup lock build operators sbom test test-cpp test-python train compare fuzz \
        sanitize asan tsan bench format format-check tidy docs wheel wheel-setup package \
        install-test lab gpu-test gpu-bench \
        gpu-cases gpu-train gpu-power clean

all: build

system:
	bash scripts/system.sh install

# The Python environment. Missing Debian packages are named, not installed.
$(VENV)/.ready: scripts/setup.sh scripts/system.sh requirements.in requirements.txt
	PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	touch $@

setup: $(VENV)/.ready

# Versions and hashes of all Python packages anew, from requirements.in and requirements-wheel.in.
# ARGS=--upgrade takes newer ones. Packages of both have one version.
LOCK = $(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
       --custom-compile-command "make lock"
lock: setup
	$(LOCK) --no-emit-package torch --excludes scripts/lock_excludes.txt \
	      requirements.in -o requirements.txt $(ARGS)
	$(LOCK) -c requirements.txt \
	      scripts/requirements-wheel.in -o scripts/requirements-wheel.txt $(ARGS)

# $(call configure,FOLDER,OPTIONS): quiet unless it fails.
define configure
	cmake -S . -B "$(1)" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSONICMOE_BUILD_TORCH=ON \
	      -DPython3_EXECUTABLE=$(PY) $(2) > "$(1).log" 2>&1 || { cat "$(1).log"; exit 1; }
endef

build: setup
	$(call configure,$(BUILD))
	cmake --build "$(BUILD)" -j $(JOBS)

# What training needs: the operators alone, and kernels for a GPU only where one is visible. They have
# a folder of their own until `make` has configured everything.
OPERATORS = $(if $(wildcard $(BUILD)/CMakeCache.txt),$(BUILD),$(BUILD)-train)
WITHOUT_THE_REST = -DSONICMOE_BUILD_CLI=OFF -DSONICMOE_BUILD_TESTS=OFF \
                   $$(nvidia-smi -L > /dev/null 2>&1 || echo -DSONICMOE_CUDA=OFF)

operators: setup
	$(call configure,$(OPERATORS),$(if $(filter $(BUILD),$(OPERATORS)),,$(WITHOUT_THE_REST)))
	cmake --build "$(OPERATORS)" --target sonicmoe_torch -j $(JOBS)

test: test-cpp test-python install-test

test-cpp: build
	ctest --test-dir "$(BUILD)" --output-on-failure

test-python: build
	SONICMOE_CLI="$$(cd "$(BUILD)" && pwd)/cli/sonicmoe" $(PY) -m pytest -q --timeout 600 tests

# dist/: the wheel that runs on any Linux with glibc 2.28 and the source archive. The kernels are those
# that `make build` compiled.
wheel: build wheel-setup
	$(PY) scripts/wheel.py dist \
	      "$$(ls -d "$(BUILD)/src/CMakeFiles/sonicmoe.dir/cuda" 2> /dev/null)"

wheel-setup: $(VENV)/.wheel

$(VENV)/.wheel: scripts/requirements-wheel.txt $(VENV)/.ready
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r $<
	touch $@

# An archive of the C++ package: headers, static library, CMake files, the command.
package: build
	rm -f "$(BUILD)"/sonicmoe-*.tar.gz
	cd "$(BUILD)" && cpack > package.log || { cat package.log; exit 1; }
	ls "$(BUILD)"/*.tar.gz

install-test: package wheel
	bash tests/install/install_test.sh "$(BUILD)"
	$(PY) tests/install/try_wheel.py dist/*.whl

# What the wheels in dist/ hold and need, beside each: CycloneDX JSON.
sbom: setup
	$(PY) scripts/sbom.py $(wildcard dist/*.whl)

train: operators
	$(PY) -m trainer.train $(ARGS)

compare: operators
	$(PY) -m trainer.compare $(ARGS)

fuzz: build
	"$(BUILD)/tests/sonicmoe_fuzz" --cases $(FUZZ_CASES)
	"$(BUILD)/tests/sonicmoe_fuzz" --arguments $(FUZZ_CASES)

sanitize: asan tsan

# ASan and UBSan. Neither needs the Python environment.
asan:
	bash scripts/system.sh
	cmake --preset asan && cmake --build --preset asan -j $(JOBS)
	OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 ctest --preset asan -j $(JOBS)

# TSan on std::thread, since it does not see OpenMP's barriers; the tests that start threads.
tsan:
	bash scripts/system.sh
	cmake --preset tsan && cmake --build --preset tsan -j $(JOBS)
	OMP_NUM_THREADS=1 TSAN_OPTIONS=suppressions=../../tests/tsan.supp ctest --preset tsan -j $(JOBS)

# Times the CPU; the GPU's pictures are drawn from the records in bench/results.
bench: build
	$(PY) -m bench.cpu $(ARGS)
	$(PY) -m bench.plots

format: setup
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i
	$(VENV)/bin/ruff format -q . && $(VENV)/bin/ruff check -q --fix .

format-check: setup
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/ruff format -q --check . && $(VENV)/bin/ruff check -q .
	git ls-files | xargs $(VENV)/bin/codespell
	$(VENV)/bin/mypy --no-error-summary

# .clang-tidy's checks on host code. OpenMP's header is the compiler's own: clang-tidy has none.
tidy: build
	$(PY) $(VENV)/bin/run-clang-tidy.py -quiet -j $(JOBS) -p "$(BUILD)" \
	      -clang-tidy-binary "$$PWD/$(VENV)/bin/clang-tidy" \
	      -extra-arg=-idirafter"$$(dirname "$$(g++ -print-file-name=include/omp.h)")" \
	      '/(src/(?!cuda)|cli|oracle|rig)/?.*\.cpp$$' > "$(BUILD)-tidy.log" 2>&1 || \
	      { grep -E -A4 '(error|warning):' "$(BUILD)-tidy.log"; exit 1; }

# The pages and the reference of headers and docstrings, in build/docs. A broken link is an error,
# but not with -q, which silences the count of warnings too.
docs: setup
	$(PY) scripts/api_reference.py
	PATH="$$PWD/$(VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Experiments on a GPU by themselves (lab/README.md). Needs nvcc.
lab: build
	cmake --build "$(BUILD)" --target lab -j $(JOBS)

# On a GPU, with what `make build` made. GPU_PYTHON names a Python whose torch sees the GPU.
gpu-test:
	"$(BUILD)/cli/sonicmoe" info | grep -q '^cuda  *on' || { "$(BUILD)/cli/sonicmoe" info; exit 1; }
	"$(BUILD)/tests/sonicmoe_ops_tests" --gtest_brief=1 --gtest_filter='*cuda*'
	"$(BUILD)/tests/sonicmoe_exchange_tests" --gtest_brief=1 --gtest_filter='*cuda*:ExchangeGraph*'
	"$(BUILD)/tests/sonicmoe_fuzz" --cases 1000
	$(GPU_PYTHON) -m pytest -q --timeout 300 tests/torch/test_cuda.py

gpu-bench:  # this library, torch's grouped_mm, cuBLAS, sonic-moe where it is installed
	$(GPU_PYTHON) -m bench.layer $(ARGS)

gpu-cases:  # limits, skew, token rounding, routing's share
	$(GPU_PYTHON) -m bench.cases $(ARGS)

gpu-power:  # ARGS=SHAPE: energy of each product alone, beside cuBLAS
	"$(BUILD)/lab/products" power $(ARGS)

gpu-train:  # DATA=tokens.bin: a whole model with all systems, over the GPUs there are
	$(GPU_PYTHON) -m bench.train --data "$(DATA)" --gpus 0 --loss-steps 200 --limit 200 \
	      --deadline 2600 $(ARGS)

clean:
	rm -rf "$(BUILD)" "$(BUILD)"-* "$(BUILD).log"
