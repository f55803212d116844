"""What importing brings along, in a fresh process."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sonicmoe_cpp

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bindings" / "torch"
SCRIPT = """
import sys
import torch
import sonicmoe_cpp as sm
layer = sm.MoE(64, 32, 8, 2)
layer(torch.randn(16, 64)).sum().backward()
print("transformers" in sys.modules)
"""


def test_import_and_first_call_leave_transformers_out():
    command = [sys.executable, "-c", SCRIPT]
    environment = {"PYTHONPATH": str(PACKAGE), "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"], "transformers must be imported on request only"


def test_a_missing_library_is_named(tmp_path):
    """As a build does on a machine that lacks a library of the machine it was built on."""
    package = Path(importlib.util.find_spec("sonicmoe_cpp").origin).parent
    copy = shutil.copytree(package, tmp_path / "sonicmoe_cpp")
    operators = (copy / "_C.so").read_bytes()
    assert b"dnnl.so." in operators
    (copy / "_C.so").write_bytes(operators.replace(b"dnnl.so.", b"dnnX.so."))
    command = [sys.executable, "-c", "import sonicmoe_cpp"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and last.startswith("ImportError: sonicmoe_cpp: ")
    assert "dnnX.so." in last and "Install the library" in last


@pytest.mark.skipif(not (ROOT / "include").exists(), reason="needs the sources")
def test_the_version_is_the_librarys():
    header = (ROOT / "include" / "sonicmoe" / "version.hpp").read_text()
    numbers = re.findall(r"define SONICMOE_VERSION_\w+ (\d+)", header)
    assert sonicmoe_cpp.__version__ == ".".join(numbers)
