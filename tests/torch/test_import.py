"""What importing costs, in a fresh process."""

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "bindings" / "torch"
SCRIPT = """
import sys, time
import torch
start = time.perf_counter()
import sonicmoe_cpp as sm
layer = sm.MoE(64, 32, 8, 2)
layer(torch.randn(16, 64)).sum().backward()
print(time.perf_counter() - start, "transformers" in sys.modules)
"""


def test_import_and_first_call_cost_less_than_a_second():
    command = [sys.executable, "-c", SCRIPT]
    environment = {"PYTHONPATH": str(PACKAGE), "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, loaded = result.stdout.split()
    assert float(seconds) < 1.0
    assert loaded == "False", "transformers must be imported on request only"
