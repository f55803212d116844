"""The runner itself: what it tells of ranks that pass, fail, die and hang."""

import time
from types import ModuleType

import pytest
import ranks
import torch.distributed as dist


def program(folder, text):
    path = folder / "program.py"
    path.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + text)
    return path


def test_each_rank_has_its_status_its_output_and_its_arguments(tmp_path):
    text = "print('rank', rank, 'of', os.environ['WORLD_SIZE'], *sys.argv[1:])\nsys.exit(rank)"
    ended = ranks.run(program(tmp_path, text), 3, "one", "two")
    assert ended == [(rank, f"rank {rank} of 3 one two\n") for rank in range(3)]


def test_those_that_wait_for_a_failed_rank_are_ended_with_their_stacks(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_S", 0.5)
    text = "def waits():\n    time.sleep(100)\n\nwaits() if rank == 0 else sys.exit('gone')"
    start = time.monotonic()
    (status, output), failed = ranks.run(program(tmp_path, text), 2)
    assert time.monotonic() - start < 60
    assert status < 0 and "in waits" in output
    assert failed == (1, "gone\n")


def test_a_hang_ends_with_the_time(tmp_path):
    ended = ranks.run(program(tmp_path, "print('here')\ntime.sleep(100)"), 2, timeout_s=2)
    assert all(status < 0 and output.startswith("here") for status, output in ended)


CASES = """
import ranks, torch, torch.distributed as dist

def case_sum():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2

def case_fails_on_one_rank():
    assert rank == 0, "as it should"

def case_after_it():
    case_sum()

def case_ends_a_rank():
    os._exit(rank)

if __name__ == "__main__":
    ranks.main()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_cases(tmp_path):
    module = ModuleType("program")
    module.__file__ = str(program(tmp_path, CASES))
    exec(CASES, vars(module))
    names = ranks.cases(module)
    assert len(names) == 4
    for name in names[0], names[2]:
        ranks.check(module, 2, name)
    with pytest.raises(AssertionError, match="^rank 1: Traceback(.|\n)*as it should") as failed:
        ranks.check(module, 2, names[1])
    assert "rank 0" not in str(failed.value)
    with pytest.raises(AssertionError, match="rank 1: it did not come to case_ends_a_rank"):
        ranks.check(module, 2, names[3])
