"""The blocks of docs/guide/distributed.md, each process in a namespace of its own, in order."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/guide/distributed.md"
FENCED = r"```python\n(.*?)```"
HIDDEN = r"<!-- invisible-code-block: python\n(.*?)-->"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


def script() -> str:
    """Everything that the page shows and hides."""
    blocks = re.findall(f"{FENCED}|{HIDDEN}", PAGE.read_text(), re.DOTALL)
    return "\n".join(shown or hidden for shown, hidden in blocks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(program: Path, world: int) -> list[tuple[int, str]]:
    """Exit status and output of each process."""
    paths = (REPOSITORY / "bindings/torch", REPOSITORY)
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, program], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    return [(process.wait(), process.stdout.read()) for process in processes]


def test_every_block_of_the_page_runs_in_two_processes(tmp_path):
    pytest.importorskip("transformers")
    program = tmp_path / "page.py"
    program.write_text(script() + '\nprint("whole page")\n')
    for status, output in run(program, 2):
        assert status == 0 and "whole page" in output, output[-3000:]


def test_the_page_shows_each_door():
    for word in ("DistributedDataParallel", "fully_shard", "sm.route", "ep_size"):
        assert word in script()
