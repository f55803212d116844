"""Processes end as they should: with their own status and nothing on stderr, whatever this package
still holds then (kept memory, pools of threads, primitives, a GPU's handles). SONICMOE_EXITS sets
the number of processes of each kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "bindings" / "torch"
EXITS = int(os.environ.get("SONICMOE_EXITS", "1"))
START = """
import threading, torch, sonicmoe_cpp as sm
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = sm.MoE(256, 256, 8, 2, device=device, dtype=torch.bfloat16)
x = torch.randn(2048, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
def step():
    y = layer(x)  # H and the weight gradients are large enough to be kept on the CPU
    y.backward(torch.ones_like(y))
    return y
"""
ENDS = {
    "after a step": "step(); print('done')",
    "with a graph alive": "y = layer(x); keep = [y, step()]; print('done')",
    "after steps on threads that ended": """
for _ in range(3):
    threads = [threading.Thread(target=step) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
print('done')
""",
    "while a thread waits with results": """
ready, gate = threading.Event(), threading.Event()
def work():
    held = step()
    ready.set()
    gate.wait()
threading.Thread(target=work, daemon=True).start()
ready.wait(); step(); print('done')
""",
    "from an exit handler": "import atexit; atexit.register(step); step(); print('done')",
}


@pytest.mark.parametrize("end", ENDS)
def test_exit(end):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-W", "ignore", "-c", START + ENDS[end]]
    for _ in range(EXITS):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
