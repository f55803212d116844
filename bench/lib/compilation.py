"""Compiles torch-grouped_mm-compiled for many shapes at once: a process for each, side by side as
far as the GPU's memory and the cores allow. Inductor's caches on disk (TORCHINDUCTOR_CACHE_DIR,
else /tmp/torchinductor_USER) then serve bench/layer.py. Called by `bench/layer.py --compile-only`;
itself a worker: -m bench.lib.compilation NAME T d n E K.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.lib.problem import GIB
from bench.lib.record import REPOSITORY

CONTEXT_BYTES = GIB  # of CUDA and the libraries, per process
SHARE = 0.93  # of the free memory that the workers may need together


def needed_bytes(shape: tuple[int, ...]) -> int:
    """Most that torch's layer takes in forward and backward, rather too much than too little."""
    tokens, d, n, experts, top_k = shape
    rows = tokens * top_k
    weights = 3 * experts * n * d
    elements = 2 * weights + 4 * rows * d + 7 * rows * n + 4 * tokens * d
    return 2 * elements + CONTEXT_BYTES


def next_to_start(waiting: list[int], running: list[int], workers: int, memory: int) -> int | None:
    """Place in `waiting` of the first job that fits beside those running (bytes each). One that
    fits nowhere runs alone."""
    if len(running) >= workers:
        return None
    for place, needed in enumerate(waiting):
        if not running or sum(running) + needed <= memory:
            return place
    return None


def worker_command(entry: dict) -> list[str]:
    return [sys.executable, "-m", "bench.lib.compilation", entry["name"], *map(str, entry["shape"])]


@dataclass
class Worker:
    name: str
    needed: int
    process: subprocess.Popen
    begin: float

    def stop(self) -> None:
        """With its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self, limit: float) -> str | None:
        """None while it runs; else "done" or why not. One past `limit` seconds is stopped."""
        status, seconds = self.process.poll(), time.monotonic() - self.begin
        if status is None and seconds < limit:
            return None
        self.stop()
        if status is None:
            return f"stopped after {limit:.0f} s"
        return "done" if status == 0 else f"failed (exit {status})"


def compile_all(
    entries: list[dict],
    workers: int,
    limit: float,
    memory: int,
    command: Callable[[dict], list[str]] = worker_command,
) -> dict[str, str]:
    """The outcome by the shape's name, the largest shapes first. memory: the GPU's free bytes."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    waiting = sorted(entries, key=lambda entry: -needed_bytes(entry["shape"]))
    running: list[Worker] = []
    outcomes: dict[str, str] = {}
    usable = int(SHARE * memory)
    begin = time.monotonic()

    def place() -> int | None:
        sizes = [needed_bytes(entry["shape"]) for entry in waiting]
        return next_to_start(sizes, [worker.needed for worker in running], workers, usable)

    def start(entry: dict) -> None:
        process = subprocess.Popen(
            command(entry), env=environment, cwd=REPOSITORY, start_new_session=True
        )
        needed = needed_bytes(entry["shape"])
        running.append(Worker(entry["name"], needed, process, time.monotonic()))

    try:
        while waiting or running:
            while (found := place()) is not None:
                start(waiting.pop(found))
            time.sleep(0.1)
            for worker in list(running):
                if outcome := worker.outcome(limit):
                    running.remove(worker)
                    outcomes[worker.name] = outcome
                    now = time.monotonic()
                    spans = f"{now - worker.begin:.1f} s, {now - begin:.1f} s since the start"
                    print(f"{worker.name:14}compile: {outcome}, {spans}", flush=True)
    finally:
        for worker in running:
            worker.stop()
    return outcomes


def compile_shape(name: str, shape: tuple[int, ...], device: str = "cuda") -> None:
    """The first forward and backward: inductor compiles the latter when it is first asked for."""
    import torch

    from bench.lib.problem import Problem
    from bench.systems.grouped_mm import CompiledGroupedMM

    p = Problem(name, shape, device)
    torch.autograd.grad(CompiledGroupedMM().layer(p), p.leaves, p.grad)
    caches = torch._dynamo.utils.counters["inductor"]
    hits, misses = caches["fxgraph_cache_hit"], caches["fxgraph_cache_miss"]
    print(f"{name:14}inductor's cache: {hits} hits, {misses} misses", flush=True)


if __name__ == "__main__":
    compile_shape(sys.argv[1], tuple(map(int, sys.argv[2:7])), *sys.argv[7:])
