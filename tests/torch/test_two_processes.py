"""The blocks of pages, each process in a namespace of its own, in order."""

import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests/distributed"))

import ranks

PAGES = {
    "distributed": (
        *("DistributedDataParallel", "parallelize_experts", "row_capacity", "ep_implementation"),
        *("save_pretrained", "load_pretrained"),
    ),
    "trainers-fsdp2": ("accelerator.prepare", "transformers.Trainer", "ep_size"),
    "fsdp2": ("fully_shard", "Shard(1)", "to_empty", "clip_grad_norm_", "replace_moe_blocks"),
}  # with what each has to show
FENCED = r"```python\n(.*?)```"
HIDDEN = r"<!-- invisible-code-block: python\n(.*?)-->"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


def script(page: str) -> str:
    """Everything that the page shows and hides."""
    text = (REPOSITORY / f"docs/guide/{page}.md").read_text()
    blocks = re.findall(f"{FENCED}|{HIDDEN}", text, re.DOTALL)
    return "\n".join(shown or hidden for shown, hidden in blocks)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs_in_two_processes(page, tmp_path):
    pytest.importorskip("transformers")
    program = tmp_path / "page.py"
    program.write_text(script(page) + '\nprint("whole page")\n')
    for status, output in ranks.run(program, 2):
        assert status == 0 and "whole page" in output, output[-3000:]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_each_door(page):
    for word in PAGES[page]:
        assert word in script(page)
