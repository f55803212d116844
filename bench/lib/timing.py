"""Timers: marks on the GPU's stream, or on the CPU the time of day."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.lib.problem import MIB, Problem

SETTLE_S = 0.25  # of load before a figure, for the clock to settle at the card's power limit

Call = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How a figure is timed: for `seconds`, after `settle` seconds of the same load, after `rest`
    seconds of none. The rest is there for every system to start alike: at the card's power limit a
    figure seems to depend on the load before it (docs/lab/M11.md)."""

    seconds: float = 0.15
    settle: float = SETTLE_S
    rest: float = 0.5


class Clock:
    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.cuda = torch.device(device).type == "cuda"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, begin, end) -> float:
        """After wait()."""
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)


def require_gpu() -> None:
    """Ends the program where there is none; else brings up cuBLAS and torch's autograd."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(sys.argv[0]).name}: torch sees no GPU here")
    one = torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
    one @ one
    torch.ones(1, requires_grad=True).backward(torch.ones(1))  # torch's own first backward: sympy


def warm_seconds(call: Call, seconds: float = SETTLE_S, clock: Clock | None = None) -> float:
    """Seconds of one call: the mean over `seconds` of calls, after one that may allocate."""
    clock = clock or Clock()
    call()
    clock.wait()
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        call()
        clock.wait()
        count += 1
    return max((time.perf_counter() - begin) / count, 1e-6)


def rest(pace: Pace, clock: Clock | None = None) -> None:
    (clock or Clock()).wait()
    time.sleep(pace.rest)


def series_ms(call: Call, count: int) -> list[float]:
    """Time from one call's start to the next's on the stream, back to back, for `count` calls after
    one that is not counted."""
    clock = Clock()
    call()
    marks = [clock.mark()]
    for _ in range(count):
        call()
        marks.append(clock.mark())
    clock.wait()
    return [clock.ms(a, b) for a, b in itertools.pairwise(marks)]


def alternating_ms(
    forward: Callable[[], object], backward: Callable[[object], object], count: int, clock: Clock
) -> tuple[list[float], list[float]]:
    """Milliseconds of forward() and of backward(its result), alternating back to back."""
    marks = [clock.mark()]
    for _ in range(count):
        result = forward()
        marks.append(clock.mark())
        backward(result)
        marks.append(clock.mark())
    clock.wait()
    times = [clock.ms(a, b) for a, b in itertools.pairwise(marks)]
    return times[::2], times[1::2]


def halves_ms(
    forward: Callable[[], object], backward: Callable[[object], object], pace: Pace
) -> tuple[float, float]:
    """Medians of the two, at this pace."""
    each = warm_seconds(lambda: backward(forward()), 0.0)
    rest(pace)
    for _ in range(math.ceil(pace.settle / each)):
        backward(forward())
    count = min(200, max(5, round(pace.seconds / each)))
    first, second = alternating_ms(forward, backward, count, Clock())
    return statistics.median(first), statistics.median(second)


def in_turns_ms(
    calls: dict[Hashable, Call], seconds: float, turns: int = 5
) -> dict[Hashable, float]:
    """Milliseconds of each call, the median over all its turns. The calls take turns, so that
    drifting clocks meet all of them; `seconds` is what each gets in all. First they run for
    SETTLE_S together."""
    counts = {
        key: min(100, max(1, round(seconds / turns / warm_seconds(call, SETTLE_S / len(calls)))))
        for key, call in calls.items()
    }
    times: dict[Hashable, list[float]] = {key: [] for key in calls}
    for _ in range(turns):
        for key, call in calls.items():
            times[key] += series_ms(call, counts[key])
    return {key: statistics.median(values) for key, values in times.items()}


def memory(p: Problem, layer: Callable[[Problem], torch.Tensor]) -> dict[str, float]:
    """MiB held from forward to backward, and the most in use during each, beside x and weights."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(p)
    kept = torch.cuda.memory_allocated() - before
    peak_forward = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(y, p.leaves, p.grad)
    peak_backward = torch.cuda.max_memory_allocated() - before
    outputs = sum(g.nbytes for g in grads)
    return {
        "kept_mib": kept / MIB,
        "peak_fwd_mib": peak_forward / MIB,
        # The gradients themselves are results, not memory of a system.
        "peak_bwd_mib": (peak_backward - outputs) / MIB,
    }
