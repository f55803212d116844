"""`make bench`: sonicmoe_cpp against torch.nn.functional.grouped_mm on the CPU, in one run.

The baseline is what transformers' `grouped_mm` experts do: sort the routed rows by expert, gather,
two grouped GEMMs around SwiGLU, weigh, undo the sort and sum over the K slots. Both systems get the
same inputs; results are checked first, then the two take turns, so that drifting clocks meet both.

    python -m bench.cpu --output bench/results/cpu-$(date +%F).json --plot bench-cpu.png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import sonicmoe_cpp
import torch
import torch.nn.functional as F

from bench.lib.record import REPOSITORY, commit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRADIENTS = ("x", "w1", "w2", "weights")
MINIMUM_RATIO = 1.3
GOAL_RATIO = 2.0
MOST_LOAD = 0.5

Forward = Callable[..., torch.Tensor]


def sonicmoe(x, w1, w2, ids, weights) -> torch.Tensor:
    return sonicmoe_cpp.moe(x, w1, w2, ids, weights)


def grouped_mm(x, w1, w2, ids, weights) -> torch.Tensor:
    experts, top_k = w1.shape[0], ids.shape[1]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.argsort(order)
    ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
    rows = x[order // top_k]
    gate, up = F.grouped_mm(rows, w1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    y = y * weights.reshape(-1)[order].to(y.dtype).unsqueeze(-1)
    return y[inverse].view(x.shape[0], top_k, -1).sum(1)


SYSTEMS: dict[str, Forward] = {"sonicmoe_cpp": sonicmoe, "torch_grouped_mm": grouped_mm}


@dataclass
class Problem:
    name: str
    shape: tuple[int, int, int, int, int]  # T, d, n, E, K
    dtype: str

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """Magnitudes of a trained layer: hidden values and outputs of order 1."""
        tokens, d, n, experts, top_k = self.shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator) * deviation
            return values.to(DTYPES[self.dtype])

        logits = torch.randn(tokens, experts, generator=generator)
        values, ids = logits.topk(top_k, dim=-1)
        return {
            "x": normal(tokens, d).requires_grad_(),
            "w1": normal(experts, 2 * n, d, deviation=d**-0.5).requires_grad_(),
            "w2": normal(experts, d, n, deviation=n**-0.5).requires_grad_(),
            "weights": values.softmax(-1).requires_grad_(),
            "ids": ids,
            "grad": normal(tokens, d),
        }

    @property
    def forward_flops(self) -> float:
        tokens, d, n, _, top_k = self.shape
        return 6.0 * tokens * top_k * n * d

    def kept_formula(self) -> int:
        """Bytes of H and the routing metadata (docs/ops/memory.md): what this library keeps
        beside the caller's own tensors."""
        tokens, _, n, experts, top_k = self.shape
        pairs = tokens * top_k
        return pairs * 2 * n * DTYPES[self.dtype].itemsize + 4 * (experts + 3 * pairs)


@dataclass
class Timings:
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


def run_once(forward: Forward, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward; gradients are fresh tensors for both systems."""
    for name in GRADIENTS:
        inputs[name].grad = None
    start = time.perf_counter()
    out = forward(*(inputs[name] for name in ("x", "w1", "w2", "ids", "weights")))
    middle = time.perf_counter()
    out.backward(inputs["grad"])
    return middle - start, time.perf_counter() - middle


def results(forward: Forward, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for name in GRADIENTS:
        inputs[name].grad = None
    out = forward(*(inputs[name] for name in ("x", "w1", "w2", "ids", "weights")))
    out.backward(inputs["grad"])
    return {"out": out.detach()} | {f"grad_{n}": inputs[n].grad.clone() for n in GRADIENTS}


def check(problem: Problem, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Both systems against grouped_mm in float32 on the same values. The bound is relative to
    max |reference|; zeros, with an error of 1, cannot pass."""
    exact = {
        name: value.detach().float() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    for name in GRADIENTS:
        exact[name].requires_grad_()
    reference = results(grouped_mm, exact)
    limit = 5e-5 if problem.dtype == "float32" else 4e-2
    worst = {}
    for system, forward in SYSTEMS.items():
        errors = {
            name: ((value.float() - reference[name]).abs().max() / reference[name].abs().max())
            for name, value in results(forward, inputs).items()
        }
        worst[system] = float(max(errors.values()))
        for name, error in errors.items():
            if not error <= limit:
                raise SystemExit(
                    f"{problem.name} {problem.dtype}: {system} {name} is off by {error}"
                )
    return worst


def kept_bytes(forward: Forward, inputs: dict[str, torch.Tensor]) -> int:
    """Unique storages autograd keeps that are not inputs."""
    own = {value.untyped_storage().data_ptr() for value in inputs.values()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(*(inputs[name] for name in ("x", "w1", "w2", "ids", "weights")))
    del out
    return sum(storages.values())


def summary(seconds: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p10_ms": deciles[0] * 1e3,
        "p90_ms": deciles[-1] * 1e3,
        "samples": len(seconds),
    }


def measure(problem: Problem, seconds: float, repeats: int, progress: str) -> dict:
    inputs = problem.inputs(seed=0)
    errors = check(problem, inputs)
    timings = {system: Timings() for system in SYSTEMS}
    begin = time.perf_counter()
    for count in range(repeats):
        if count >= 3 and time.perf_counter() - begin > seconds:
            break
        if sys.stderr.isatty():
            print(f"\r\033[K{progress} {problem.name} {problem.dtype} {count + 1}/{repeats}",
                  end="", file=sys.stderr, flush=True)  # fmt: skip
        for system, forward in SYSTEMS.items():
            forward_s, backward_s = run_once(forward, inputs)
            timings[system].forward.append(forward_s)
            timings[system].backward.append(backward_s)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    row: dict = {
        "name": problem.name,
        "shape": list(problem.shape),
        "dtype": problem.dtype,
    }
    totals = {}
    for system, forward in SYSTEMS.items():
        t = timings[system]
        both = [f + b for f, b in zip(t.forward, t.backward, strict=True)]
        totals[system] = statistics.median(both)
        row[system] = {
            "forward": summary(t.forward),
            "backward": summary(t.backward),
            "total": summary(both),
            "forward_gflops": problem.forward_flops / statistics.median(t.forward) / 1e9,
            "backward_gflops": 2 * problem.forward_flops / statistics.median(t.backward) / 1e9,
            "kept_bytes": kept_bytes(forward, inputs),
            "max_relative_error": errors[system],
        }
    row["ratio"] = totals["torch_grouped_mm"] / totals["sonicmoe_cpp"]
    row["kept_formula_bytes"] = problem.kept_formula()
    return row


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def other_load() -> float:
    """Load average of the last minute: other processes on the cores make every figure wrong."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def print_row(row: dict) -> None:
    ours, torch_row = row["sonicmoe_cpp"], row["torch_grouped_mm"]

    def cell(system: dict) -> str:
        t = system["total"]
        return (
            f"{system['forward_gflops']:6.0f}/{system['backward_gflops']:<5.0f}"
            f"{t['median_ms']:8.1f} ({t['p10_ms']:.1f}..{t['p90_ms']:.1f})"
        )

    shape = ",".join(map(str, row["shape"]))
    same = "=" if ours["kept_bytes"] == row["kept_formula_bytes"] else "!="
    print(f"{row['name']:8}{shape:22}{row['dtype']:9} {cell(ours):34} {cell(torch_row):34} "
          f"{row['ratio']:5.2f}x  kept {ours['kept_bytes'] / 2**20:.1f} MiB ({same} formula), "
          f"torch {torch_row['kept_bytes'] / 2**20:.1f} MiB", flush=True)  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{row['name']}\n{row['dtype']}" for row in rows]
    figure, (rates, memory) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for offset, system in ((-0.2, "sonicmoe_cpp"), (0.2, "torch_grouped_mm")):
        places = [i + offset for i in range(len(rows))]
        flops = [18.0 * r["shape"][0] * r["shape"][4] * r["shape"][2] * r["shape"][1] for r in rows]
        speed = [f / r[system]["total"]["median_ms"] / 1e6
                 for f, r in zip(flops, rows, strict=True)]  # fmt: skip
        rates.bar(places, speed, 0.4, label=system)
        memory.bar(places, [r[system]["kept_bytes"] / 2**20 for r in rows], 0.4, label=system)
    rates.set_ylabel("model GFLOP/s, forward + backward")
    memory.set_ylabel("MiB kept for backward")
    for axes in (rates, memory):
        axes.set_xticks(range(len(rows)), labels)
        axes.legend()
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="sonicmoe_cpp against torch grouped_mm on the CPU")
    parser.add_argument("--suite", default="cpu", help="a suite of bench/problems.json")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: the suite's")
    parser.add_argument("--problem", action="append", help="only problems of this name")
    parser.add_argument("--repeats", type=int, default=20, help="most calls per system")
    parser.add_argument("--seconds", type=float, default=20.0, help="per row, after three calls")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--output", type=Path, help="write the JSON record here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    arguments = parser.parse_args()
    if arguments.repeats < 3:
        parser.error("--repeats: at least 3")
    return arguments


def problems_of(arguments: argparse.Namespace) -> list[Problem]:
    suites = json.loads((REPOSITORY / "bench" / "problems.json").read_text())["suites"]
    if arguments.suite not in suites:
        raise SystemExit(f"--suite: expected one of {', '.join(suites)}, got {arguments.suite!r}")
    suite = suites[arguments.suite]
    problems = [
        Problem(entry["name"], tuple(entry["shape"]), dtype)
        for entry in suite["problems"]
        for dtype in arguments.dtype or suite["dtypes"]
        if not arguments.problem or entry["name"] in arguments.problem
    ]
    if not problems:
        raise SystemExit("--problem: none of the suite's problems has this name")
    return problems


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    problems = problems_of(arguments)
    record = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": other_load(),
        "versions": {
            "sonicmoe_cpp": sonicmoe_cpp.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": shlex.join(["python", *sys.argv]),
    }
    print(f"{record['cpu']}, {record['threads']} threads, torch {torch.__version__}; "
          "GFLOP/s forward/backward, ms of both (p10..p90)")  # fmt: skip
    print(
        f"{'problem':8}{'T,d,n,E,K':22}{'dtype':9} {'sonicmoe_cpp':34} {'torch grouped_mm':34} ratio"
    )
    if record["load_before"] > MOST_LOAD:
        print(
            f"warning: load average {record['load_before']:.1f}; other processes distort the figures"
        )
    rows = []
    for index, problem in enumerate(problems, start=1):
        progress = f"[{index}/{len(problems)}]"
        rows.append(measure(problem, arguments.seconds, arguments.repeats, progress))
        print_row(rows[-1])
    ratios = [row["ratio"] for row in rows]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    # Shared cores hurt the two systems unequally: ratios under load prove nothing.
    loaded = max(record["load_before"], other_load() - record["threads"]) > MOST_LOAD
    met = not loaded and mean >= GOAL_RATIO and min(ratios) >= MINIMUM_RATIO
    verdict = "not judged, the machine was loaded" if loaded else "met" if met else "not met"
    kept = all(row["sonicmoe_cpp"]["kept_bytes"] == row["kept_formula_bytes"] for row in rows)
    print(f"geometric mean {mean:.2f}x, lowest {min(ratios):.2f}x "
          f"(goal: mean >= {GOAL_RATIO}, none below {MINIMUM_RATIO}: {verdict}); "
          f"bytes kept {'equal' if kept else 'differ from'} the formula")  # fmt: skip
    record |= {
        "rows": rows,
        "geometric_mean": mean,
        "lowest": min(ratios),
        "goal_met": met,
        "loaded": loaded,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
