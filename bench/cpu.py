"""`make bench`: the experts on the CPU beside torch's grouped_mm, in one run.

Both systems get the same inputs and routing; results are checked first, then the two take turns, so
that drifting clocks meet both.

    python -m bench.cpu --output bench/results/cpu-$(date +%F).json --plot bench-cpu.png
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sonicmoe_cpp
import torch

from bench.lib.problem import MIB, Problem, known_suites
from bench.lib.record import new_record, write_record
from bench.lib.timing import Clock, alternating_ms
from bench.systems.grouped_mm import grouped_experts

MINIMUM_RATIO = 1.3
GOAL_RATIO = 2.0
MOST_LOAD = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 4e-2}  # of errors, relative to max |reference|

Forward = Callable[..., torch.Tensor]


def ours(x, w1, w2, ids, weights) -> torch.Tensor:
    return sonicmoe_cpp.moe(x, w1, w2, ids, weights)


SYSTEMS: dict[str, Forward] = {"sonicmoe_cpp": ours, "torch_grouped_mm": grouped_experts}


class Experts:
    """Forward and backward of a system's experts on one problem and routing."""

    def __init__(self, p: Problem, forward: Forward, dtype: torch.dtype | None = None) -> None:
        """dtype: of the same values, if not the problem's."""
        ids, weights = p.routing()
        cast = [t.detach().to(dtype or p.dtype) for t in (p.x, p.w1, p.w2)]
        x, w1, w2, weights = (t.requires_grad_() for t in (*cast, weights))
        self.leaves = {"x": x, "w1": w1, "w2": w2, "weights": weights}
        self.inputs, self.grad = (x, w1, w2, ids, weights), p.grad.to(x.dtype)
        self.system = forward

    def forward(self) -> torch.Tensor:
        return self.system(*self.inputs)

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, list(self.leaves.values()), self.grad)

    def results(self) -> dict[str, torch.Tensor]:
        out = self.forward()
        grads = dict(zip(self.leaves, self.backward(out), strict=True))
        return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in grads.items()}

    def kept_bytes(self) -> int:
        """Unique storages autograd keeps that are not inputs."""
        own = {value.untyped_storage().data_ptr() for value in self.inputs}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.forward()
        del out
        return sum(storages.values())


def kept_formula(p: Problem) -> int:
    """Bytes of H and the routing metadata (docs/ops/memory.md): what this library keeps beside the
    caller's own tensors."""
    tokens, _, n, experts, top_k = p.shape
    pairs = tokens * top_k
    return pairs * 2 * n * p.dtype.itemsize + 4 * (experts + 3 * pairs)


def check(p: Problem, systems: dict[str, Experts]) -> dict[str, float]:
    """Worst error of each system against grouped_mm in float32 on the same values. The bound is
    relative to max |reference|; zeros, with an error of 1, cannot pass."""
    reference = Experts(p, grouped_experts, torch.float32).results()
    worst = {}
    for system, experts in systems.items():
        errors = {
            name: float((value.float() - reference[name]).abs().max() / reference[name].abs().max())
            for name, value in experts.results().items()
        }
        worst[system] = max(errors.values())
        for name, error in errors.items():
            if not error <= LIMITS[p.dtype]:
                raise SystemExit(f"{p.name} {p.dtype}: {system} {name} is off by {error}")
    return worst


def quantiles(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    median = statistics.median(ms)
    return {"median_ms": median, "p10_ms": deciles[0], "p90_ms": deciles[-1], "samples": len(ms)}


def measure(p: Problem, seconds: float, repeats: int) -> dict:
    """Three calls of each system at least, then more until `seconds` have passed."""
    systems = {name: Experts(p, forward) for name, forward in SYSTEMS.items()}
    errors = check(p, systems)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SYSTEMS}
    begin = time.perf_counter()
    for count in range(repeats):
        if count >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, one in systems.items():
            (forward,), (backward,) = alternating_ms(one.forward, one.backward, 1, Clock("cpu"))
            times[name].append((forward, backward))
    row: dict = {"name": p.name, "shape": list(p.shape), "dtype": str(p.dtype).split(".")[1]}
    totals = {}
    for name, one in systems.items():
        forward, backward = (list(column) for column in zip(*times[name], strict=True))
        both = [sum(pair) for pair in times[name]]
        totals[name] = statistics.median(both)
        row[name] = {
            "forward": quantiles(forward),
            "backward": quantiles(backward),
            "total": quantiles(both),
            "forward_gflops": p.flops / statistics.median(forward) / 1e6,
            "backward_gflops": 2 * p.flops / statistics.median(backward) / 1e6,
            "kept_bytes": one.kept_bytes(),
            "max_relative_error": errors[name],
        }
    row["ratio"] = totals["torch_grouped_mm"] / totals["sonicmoe_cpp"]
    row["kept_formula_bytes"] = kept_formula(p)
    return row


def other_load() -> float:
    """Load average of the last minute: other processes on the cores make every figure wrong."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def describe(row: dict) -> str:
    mine, torch_row = row["sonicmoe_cpp"], row["torch_grouped_mm"]

    def cell(system: dict) -> str:
        t = system["total"]
        return (
            f"{system['forward_gflops']:6.0f}/{system['backward_gflops']:<5.0f}"
            f"{t['median_ms']:8.1f} ({t['p10_ms']:.1f}..{t['p90_ms']:.1f})"
        )

    shape = ",".join(map(str, row["shape"]))
    same = "=" if mine["kept_bytes"] == row["kept_formula_bytes"] else "!="
    return (
        f"{row['name']:8}{shape:22}{row['dtype']:9} {cell(mine):34} {cell(torch_row):34} "
        f"{row['ratio']:5.2f}x  kept {mine['kept_bytes'] / MIB:.1f} MiB ({same} formula), "
        f"torch {torch_row['kept_bytes'] / MIB:.1f} MiB"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--suite", default="cpu", choices=known_suites(), help="a suite of bench/problems.json")
    add("--dtype", choices=DTYPES, action="append", help="default: the suite's")
    add("--problem", action="append", help="only problems of this name")
    add("--repeats", type=int, default=20, help="most calls per system")
    add("--seconds", type=float, default=20.0, help="per row, after three calls")
    add("--threads", type=int, default=0, help="0: torch's default")
    add("--output", type=Path, help="write the JSON record here")
    add("--plot", type=Path, help="write a picture here")
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 3:
        parser.error("--repeats: expected at least 3")
    suite = known_suites()[parsed.suite]
    parsed.problems = [
        (entry["name"], tuple(entry["shape"]), dtype)
        for entry in suite["problems"]
        for dtype in parsed.dtype or suite["dtypes"]
        if not parsed.problem or entry["name"] in parsed.problem
    ]
    if not parsed.problems:
        parser.error("--problem: none of the suite's problems has this name")
    return parsed


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    record = new_record("cpu", threads=threads, load_before=other_load())
    print(f"{record['device']}, {threads} threads, torch {torch.__version__}; "
          "GFLOP/s forward/backward, ms of both (p10..p90)")  # fmt: skip
    print(f"{'problem':8}{'T,d,n,E,K':22}{'dtype':9} {'sonicmoe_cpp':34} {'grouped_mm':34} ratio")
    if record["load_before"] > MOST_LOAD:
        print(f"warning: load average {record['load_before']:.1f}: other processes distort figures")
    for name, shape, dtype in arguments.problems:
        problem = Problem(name, shape, "cpu", DTYPES[dtype])
        record["rows"].append(measure(problem, arguments.seconds, arguments.repeats))
        print(describe(record["rows"][-1]), flush=True)
    rows = record["rows"]
    ratios = [row["ratio"] for row in rows]
    mean = statistics.geometric_mean(ratios)
    # Shared cores hurt the two systems unequally: ratios under load prove nothing.
    loaded = max(record["load_before"], other_load() - threads) > MOST_LOAD
    met = not loaded and mean >= GOAL_RATIO and min(ratios) >= MINIMUM_RATIO
    verdict = "not judged, the machine was loaded" if loaded else "met" if met else "not met"
    kept = all(row["sonicmoe_cpp"]["kept_bytes"] == row["kept_formula_bytes"] for row in rows)
    print(f"geometric mean {mean:.2f}x, lowest {min(ratios):.2f}x "
          f"(goal: mean >= {GOAL_RATIO}, none below {MINIMUM_RATIO}: {verdict}); "
          f"bytes kept {'equal' if kept else 'differ from'} the formula")  # fmt: skip
    record |= {"geometric_mean": mean, "lowest": min(ratios), "goal_met": met, "loaded": loaded}
    write_record(record, arguments.output)
    if arguments.plot:
        from bench.plots import plot_cpu

        plot_cpu(rows, arguments.plot)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
