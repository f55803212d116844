"""What the GPU benchmarks share: one layer's tensors, timers, memory, the JSON record."""

from __future__ import annotations

import itertools
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.lib.record import REPOSITORY, commit

BF16 = torch.bfloat16
MIB = 2**20
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


class Problem:
    """Parameters and inputs of one shape, shared by all systems."""

    def __init__(
        self, name: str, shape: tuple[int, int, int, int, int], device: str = "cuda"
    ) -> None:
        self.name, self.shape = name, shape
        tokens, d, n, experts, _ = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            values = torch.empty(size, device=device, dtype=BF16)
            values.normal_(0, deviation, generator=generator)
            return values

        self.x = normal(tokens, d).requires_grad_()
        self.router = normal(experts, d, deviation=d**-0.5).requires_grad_()
        self.w1 = normal(experts, 2 * n, d, deviation=d**-0.5).requires_grad_()
        self.w2 = normal(experts, d, n, deviation=n**-0.5).requires_grad_()
        self.grad = normal(tokens, d)

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.router, self.w1, self.w2

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(("T", "d", "n", "E", "K"), self.shape, strict=True))

    @property
    def flops(self) -> float:
        tokens, d, n, _, top_k = self.shape
        return 6.0 * tokens * top_k * n * d


# ------------------------------------------------------------------------------------- measurement


def warm_seconds(call: Call, seconds: float = SETTLE_S) -> float:
    """Seconds of one call: the mean over `seconds` of calls, after one that may allocate."""
    call()
    torch.cuda.synchronize()
    count, begin = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begin < seconds:
        call()
        torch.cuda.synchronize()
        count += 1
    return max((time.perf_counter() - begin) / count, 1e-6)


def series_ms(call: Call, count: int) -> list[float]:
    """Time from one call's start to the next's on the stream, back to back, for `count` calls after
    one that is not counted."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def rest(pace: Pace) -> None:
    torch.cuda.synchronize()
    time.sleep(pace.rest)


def halves_ms(
    forward: Callable[[], object], backward: Callable[[object], object], pace: Pace
) -> tuple[float, float]:
    """Median milliseconds of forward() and of backward(its result), which alternate back to back."""
    each = warm_seconds(lambda: backward(forward()), 0.0)
    rest(pace)
    for _ in range(math.ceil(pace.settle / each)):
        backward(forward())
    marks = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    mark()
    for _ in range(min(200, max(5, round(pace.seconds / each)))):
        result = forward()
        mark()
        backward(result)
        mark()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times[::2]), statistics.median(times[1::2])


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


# ------------------------------------------------------------------------------- input and output


def suite_entries(suites: list[str], names: list[str] | None = None) -> list[dict]:
    """Problems of these suites of bench/problems.json, of these names only if any are given."""
    known = json.loads((REPOSITORY / "bench" / "problems.json").read_text())["suites"]
    entries = [entry for suite in suites for entry in known[suite]["problems"]]
    return [entry for entry in entries if not names or entry["name"] in names]


def require_gpu() -> None:
    """Ends the program where there is none; else brings up cuBLAS and torch's autograd."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{Path(sys.argv[0]).name}: torch sees no GPU here")
    torch.ones(8, 8, device="cuda", dtype=BF16) @ torch.ones(8, 8, device="cuda", dtype=BF16)
    torch.ones(1, requires_grad=True).backward(torch.ones(1))  # torch's own first backward: sympy


def new_record(**more) -> dict:
    """A JSON record that says what is measured, where and how to repeat it; its rows are empty."""
    import sonicmoe_cpp

    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "sonicmoe_cpp": sonicmoe_cpp.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "command": shlex.join(["python", *sys.argv]),
        **more,
        "rows": [],
    }


def write_record(record: dict, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def rounded(value):
    """Floats of 4 significant digits, in nested dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
