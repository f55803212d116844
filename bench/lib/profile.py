"""What the GPU does during calls: the intervals of kernels, copies and fills (CUPTI)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from bench.lib.timing import Call, Pace, rest

MARK = "spin_kernel"  # what torch.cuda._sleep launches
LEAST_CALLS, MOST_CALLS = 3, 20  # counted in a profile


class Span(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


class Halves(NamedTuple):
    """One call's spans, of its forward and of its backward."""

    forward: list[Span]
    backward: list[Span]


def device_spans(run: Callable[[], None]) -> list[Span]:
    """What the GPU does during `run`, by start."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans = (
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return sorted(spans, key=lambda span: span.start)


def busy_by_name(spans: Iterable[Span]) -> dict[str, float]:
    """Microseconds by kernel, copy and fill; where two overlap, the earlier has the time. The sum
    is the union of the intervals. The spans come by start."""
    totals: dict[str, float] = {}
    reached = -math.inf
    for name, start, end in spans:
        totals[name] = totals.get(name, 0.0) + max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return totals


def busy_us(call: Call, repeats: int = 5) -> dict[str, float]:
    """busy_by_name per call."""

    def run() -> None:
        for _ in range(repeats):
            call()

    return {name: us / repeats for name, us in busy_by_name(device_spans(run)).items()}


# ----------------------------------------------------------------------- forward and backward apart


def mark() -> None:
    """A kernel of a microsecond that no system launches."""
    torch.cuda._sleep(1)


def halves_of(spans: Iterable[Span], calls: int) -> list[Halves]:
    """Splits a profile of `calls` calls, each marked before its forward and before its backward.
    The marks belong to neither, nor does what precedes the first."""
    parts: list[list[Span]] = []
    for span in spans:
        if MARK in span.name:
            parts.append([])
        elif parts:
            parts[-1].append(span)
    if len(parts) != 2 * calls:
        raise RuntimeError(f"profile of {calls} calls: {len(parts)} marks, not {2 * calls}")
    return [Halves(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def profiled_halves(
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor], object],
    call_ms: float,
    pace: Pace,
) -> list[Halves]:
    """The calls of the last pace.seconds of one profile, whose first pace.settle are not counted.
    call_ms: what a forward and a backward take together."""
    settling = math.ceil(pace.settle * 1e3 / call_ms)
    counted = min(MOST_CALLS, max(LEAST_CALLS, round(pace.seconds * 1e3 / call_ms)))

    def run() -> None:
        for _ in range(settling + counted):
            mark()
            y = forward()
            mark()
            backward(y)

    rest(pace)
    return halves_of(device_spans(run), settling + counted)[-counted:]


def busy_ms(spans: Iterable[Span]) -> float:
    return sum(busy_by_name(spans).values()) / 1e3


def busy_figures(calls: list[Halves]) -> dict[str, float]:
    """Medians over the calls."""
    return {
        "busy_fwd_ms": statistics.median(busy_ms(call.forward) for call in calls),
        "busy_bwd_ms": statistics.median(busy_ms(call.backward) for call in calls),
    }


def kernel_table(calls: list[list[Span]]) -> list[tuple[float, float, str]]:
    """Microseconds per call, launches per call and name of each kernel, the longest first."""
    totals: dict[str, list[float]] = {}
    for spans in calls:
        for span in spans:
            totals.setdefault(span.name, []).append(span.end - span.start)
    rows = (
        (sum(times) / len(calls), len(times) / len(calls), name) for name, times in totals.items()
    )
    return sorted(rows, reverse=True)
