"""What importing brings along, in a fresh process."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "bindings" / "torch"
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
