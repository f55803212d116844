"""The layers of the sources (scripts/check_layers.py), and that the check can fail."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "check_layers.py"
spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
check_layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_layers)


def test_every_file_keeps_to_its_layer():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("path", "line", "reason"),
    [
        ("src/cuda/experts/a.cpp", '#include "cuda/hopper/b.hpp"', "must not include src/cuda/hop"),
        (
            "src/cuda/router/a.cu",
            '#  include "cuda/experts/b.hpp"',
            "must not include src/cuda/exp",
        ),
        ("src/cuda/hopper/tile/a.cuh", '#include "../b.hpp"', "must not include src/cuda/hopper/b"),
        ("src/cpu/a.cpp", '#include "reference/b.hpp"', "must not include src/reference/b.hpp"),
        ("cli/a.cpp", '#include "core/b.hpp"', "cli must not include src/core/b.hpp"),
        ("include/sonicmoe/a.hpp", "#include <torch/all.h>", "only bindings may include"),
        ("include/sonicmoe/a.hpp", "#include <cuda_bf16.h>", "may include <cuda_bf16.h>"),
        ("src/core/a.cpp", "#include <ATen/ATen.h>", "may include <ATen/ATen.h>"),
        ("attic/a.cpp", "", "belongs to no layer"),
    ],
)
def test_what_a_layer_must_not_know(path, line, reason):
    others = ("cuda/hopper", "cuda/experts", "reference", "core")
    contents = {f"src/{folder}/b.hpp": "" for folder in others}
    assert check_layers.problems(contents) == []
    (problem,) = check_layers.problems({**contents, path: line})
    assert problem.startswith(path) and reason in problem


def test_what_a_layer_may_know():
    contents = {
        "include/sonicmoe/b.hpp": "",
        "src/core/b.hpp": '#include "sonicmoe/b.hpp"\n#include <vector>\n',
        "src/cuda/products.hpp": '#include "core/b.hpp"\n#include <cuda_runtime_api.h>\n',
        "src/cuda/experts/a.cpp": '#include "cuda/products.hpp"\n#include "b.hpp"\n',
        "src/cuda/experts/b.hpp": "",
        "tests/ops/a.cpp": '#include "cuda/products.hpp"\n',
    }
    assert check_layers.problems(contents) == []


def test_a_circle_is_none_of_the_rules():
    assert check_layers.circles({"a": "", "b": "a"}) == []
    assert len(check_layers.circles({"a": "b", "b": "a"})) == 1
    assert len(check_layers.circles({"a": "a"})) == 1
