"""Runs a program as the ranks of one gloo group, and many cases in one such start.

A start costs seconds of every rank, so a program holds many cases, functions case_*, and a test
asks for each of them. program_sum.py:

    import ranks
    import torch
    import torch.distributed as dist

    def case_sum():
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == dist.get_world_size()

    if __name__ == "__main__":
        ranks.main()

test_sum.py:

    import program_sum
    import pytest
    import ranks

    @pytest.mark.parametrize("case", ranks.cases(program_sum))
    def test_sum(case):
        ranks.check(program_sum, 2, case)

Every rank runs every case, in the order of the file. A case that fails on any rank is a failed
test with the traceback of each such rank; the cases after it run wherever the ranks still meet. A
program may also stand alone: `run(program, world)` starts it and returns how each rank ended.
"""

import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("bindings/torch", "", "tests/distributed", "tests/torch")  # what programs import
GRACE_S = 5.0  # for the others, once a rank has failed: what it knows is in its output, not theirs
OUTCOME = "outcome of a case: "


class Ended(NamedTuple):
    """How a rank ended: its exit status (negative: the signal), and what it wrote."""

    status: int
    output: str


def run(program: Path, world: int, *arguments: str, timeout_s: float = 240) -> list[Ended]:
    """Each rank of `program arguments`, started with the environment that torchrun gives: gloo's
    `init_process_group()` takes rank, world and port from it.

    Returns when all have ended. GRACE_S after one failed, and at timeout_s, those still running are
    ended by SIGABRT, with the stack of each of their threads in the output.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(world)]
        command = [sys.executable, "-X", "faulthandler", str(program), *arguments]
        started = [
            _start(command, environment, file)
            for environment, file in zip(_environments(world), files, strict=True)
        ]
        try:
            _wait(started, time.monotonic() + timeout_s)
        finally:
            _end(started)
        outputs = [file.read_text(errors="replace") for file in files]
    statuses = [process.returncode for process in started]
    return [Ended(*pair) for pair in zip(statuses, outputs, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environments(world: int) -> list[dict[str, str]]:
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in FOLDERS)
    common = os.environ | {
        "PYTHONPATH": path, "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _start(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen:
    # A file, not a pipe: nobody waits for a reader, and what a killed rank wrote is there.
    with output.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _wait(started: list[subprocess.Popen], deadline: float) -> None:
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in started]
        if None not in statuses:
            return
        if any(statuses):  # one has failed
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.05)


def _end(started: list[subprocess.Popen]) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------------- cases of a program


def cases(program: ModuleType) -> list[str]:
    """Names of its functions case_*, in the order of the file."""
    return [name for name in vars(program) if name.startswith("case_")]


def main() -> None:
    """Of a program: runs the cases of the file, in one process group, on every rank."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    program = sys.modules["__main__"]
    for name in cases(program):
        torch.manual_seed(0)
        print(OUTCOME + json.dumps([name, _failure(getattr(program, name))]))
        dist.barrier()
    dist.destroy_process_group()


def _failure(case: Callable[[], None]) -> str:
    """The traceback of a case; empty where it passed."""
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


@functools.cache
def outcomes(program: Path, world: int) -> tuple[list[Ended], list[dict[str, str]]]:
    """How each rank of a program of cases ended, and the failures of its cases, by name. The
    program is started once for all who ask."""
    ended = run(program, world)
    lines = [rank.output.splitlines() for rank in ended]
    told = [[line.removeprefix(OUTCOME) for line in rank if OUTCOME in line] for rank in lines]
    return ended, [dict(json.loads(line[line.index("[") :]) for line in rank) for rank in told]


def check(program: ModuleType, world: int, case: str) -> None:
    """AssertionError, with the tracebacks, unless the case passed on every rank."""
    ended, failures = outcomes(Path(inspect.getfile(program)), world)
    wrong = []
    for rank, (end, failed) in enumerate(zip(ended, failures, strict=True)):
        failure = failed.get(case, f"it did not come to {case}:\n{end.output[-4000:]}")
        if failure:
            wrong.append(f"rank {rank}: {failure}")
    assert not wrong, "\n".join(wrong)
