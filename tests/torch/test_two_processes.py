"""The blocks of docs/guide/distributed.md, each process in a namespace of its own, in order."""

import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests/distributed"))

import ranks

PAGE = REPOSITORY / "docs/guide/distributed.md"
FENCED = r"```python\n(.*?)```"
HIDDEN = r"<!-- invisible-code-block: python\n(.*?)-->"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


def script() -> str:
    """Everything that the page shows and hides."""
    blocks = re.findall(f"{FENCED}|{HIDDEN}", PAGE.read_text(), re.DOTALL)
    return "\n".join(shown or hidden for shown, hidden in blocks)


def test_every_block_of_the_page_runs_in_two_processes(tmp_path):
    pytest.importorskip("transformers")
    program = tmp_path / "page.py"
    program.write_text(script() + '\nprint("whole page")\n')
    for status, output in ranks.run(program, 2):
        assert status == 0 and "whole page" in output, output[-3000:]


def test_the_page_shows_each_door():
    for word in ("DistributedDataParallel", "fully_shard", "sm.route", "ep_size"):
        assert word in script()
