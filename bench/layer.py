"""The whole layer with its router on a GPU: sonicmoe_cpp beside torch grouped_mm and cuBLAS.

Every system computes logits, top-K, softmax and SwiGLU experts in bfloat16, with all gradients.
sonicmoe-atomic adds a token's rows atomically (deterministic=False). sonic-moe is the official
layer, if its package is installed. torch-grouped_mm-compiled is the torch layer under torch.compile
as a whole; --compile-only fills inductor's cache for it. cublas-bmm is the dense, balanced product
of the same FLOPs alone: no gather, activation or sum.

Figures per shape and system, the systems taking turns; with --runs the median of the runs, and
`spread` has the least and the most:

    fwd_ms, bwd_ms            wall: medians of eager forward and backward, alternating back to back,
                              after a rest and a settling time (--rest, --settle)
    busy_fwd_ms, busy_bwd_ms  time the GPU is busy: union of the kernels' intervals (CUPTI), of the
                              forward and the backward of the same calls, the median call (not of
                              torch's)
    graph_fwd_ms, graph_bwd_ms  like wall, replaying two CUDA graphs (sonicmoe and sonic-moe)

and once:

    first_call_s              first forward and backward at this shape in this process
    kept_mib                  held by the allocator from forward to backward, beside x and weights
    peak_fwd_mib, peak_bwd_mib  most allocated during each, likewise
    rel_err                   worst relative RMS error of y, dx, dw1, dw2 against float64 on samples

The record ends with a summary beside the official layer's figures (bench/lib/summary.py).

    python -m bench.layer --suite paper --suite models --compile-only
    python -m bench.layer --suite paper --suite models --runs 3 \\
        --output bench/results/h100-$(date +%F).json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.lib import compilation, summary
from bench.lib.oracle import Oracle
from bench.lib.problem import Problem, suite_entries
from bench.lib.profile import busy_figures, kernel_table, profiled_halves
from bench.lib.record import new_record, rounded, write_record
from bench.lib.timing import Pace, halves_ms, memory, require_gpu, warm_seconds
from bench.systems import SYSTEMS, Cublas, systems_named

# ----------------------------------------------------------------------------------------- a figure


class EagerLayer:
    """Forward and backward of a system's layer on one problem."""

    def __init__(self, p: Problem, system) -> None:
        self.p, self.system = p, system

    def forward(self) -> torch.Tensor:
        return self.system.layer(self.p)

    def backward(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, self.p.leaves, self.p.grad)

    def times(self, pace: Pace, prefix: str = "") -> dict[str, float]:
        forward, backward = halves_ms(self.forward, self.backward, pace)
        return {f"{prefix}fwd_ms": forward, f"{prefix}bwd_ms": backward}


class ReplayedLayer(EagerLayer):
    """The same as two CUDA graphs; the second one reads what the first one saved."""

    def __init__(self, p: Problem, system) -> None:
        super().__init__(p, system)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            super().backward(super().forward())
        torch.cuda.current_stream().wait_stream(side)
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[0]):
            self.y = super().forward()
        with torch.cuda.graph(self.graphs[1], pool=self.graphs[0].pool()):
            # Kept: a graph that is replayed many times reads what the first one saved.
            self.grads = torch.autograd.grad(self.y, p.leaves, p.grad, retain_graph=True)

    def forward(self) -> torch.Tensor:
        self.graphs[0].replay()
        return self.y

    def backward(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.graphs[1].replay()
        return self.grads


def figures_of_run(p: Problem, system, pace: Pace) -> dict[str, float]:
    """What is measured anew in every run."""
    if isinstance(system, Cublas):
        products = system.products(p)
        times = halves_ms(products.forward, lambda _: products.backward(), pace)
        return {
            name: ms * products.scale for name, ms in zip(("fwd_ms", "bwd_ms"), times, strict=True)
        }
    layer = EagerLayer(p, system)
    figures = layer.times(pace)
    if system.profiled:
        call_ms = figures["fwd_ms"] + figures["bwd_ms"]
        figures |= busy_figures(profiled_halves(layer.forward, layer.backward, call_ms, pace))
    if system.replayed:
        figures |= ReplayedLayer(p, system).times(pace, "graph_")
    return figures


def figures_once(p: Problem, system, oracle: Oracle | None, routing) -> dict:
    """First call, memory and errors."""
    if isinstance(system, Cublas):
        return {}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    layer = EagerLayer(p, system)
    layer.backward(layer.forward())
    torch.cuda.synchronize()
    figures = {"first_call_s": time.perf_counter() - begin} | memory(p, system.layer)
    if oracle and hasattr(system, "experts"):
        errors = oracle.errors(p, system, *routing)
        figures |= {"rel_err": max(errors.values()), "errors": errors}
    return figures


# ----------------------------------------------------------------------------------------- the runs


def median_of_runs(runs: list[dict[str, float]]) -> dict:
    """The median of each figure; where there are several runs, its least and most as `spread`."""
    columns = {key: [run[key] for run in runs] for key in runs[0]} if runs else {}
    figures: dict = {key: statistics.median(column) for key, column in columns.items()}
    if len(runs) > 1:
        figures["spread"] = {key: [min(column), max(column)] for key, column in columns.items()}
    return figures


class Measured:
    """What is known of one system at one shape. After a failure nothing more is measured."""

    def __init__(self, system) -> None:
        self.system = system
        self.once: dict = {}
        self.runs: list[dict[str, float]] = []
        self.failure: dict = {}

    def measure(
        self, keep: Callable[[dict], object], figures: Callable[..., dict], *inputs
    ) -> None:
        """Calls `keep` with figures(*inputs)."""
        if self.failure:
            return
        try:
            keep(figures(*inputs))
        except torch.cuda.OutOfMemoryError:
            self.failure = {"out_of_memory": True}
        except torch._dynamo.exc.TorchDynamoException as error:
            self.failure = {"compile_error": f"{type(error).__name__}: {error}".splitlines()[0]}
        torch.cuda.empty_cache()

    def row(self, p: Problem) -> dict:
        head = {"shape": p.name, **p.sizes, "system": self.system.name}
        return head | rounded(self.once | median_of_runs(self.runs) | self.failure)


def bench_problem(p: Problem, systems: list, arguments: argparse.Namespace) -> list[dict]:
    routing = p.routing()
    oracle = None if arguments.no_check else Oracle(p, *routing)
    measured = [Measured(system) for system in systems]
    for one in measured:
        one.measure(one.once.update, figures_once, p, one.system, oracle, routing)
    for _ in range(arguments.runs):
        for one in measured:
            one.measure(one.runs.append, figures_of_run, p, one.system, arguments.pace)
    rows = [one.row(p) for one in measured]
    for row in rows:
        print(describe(p, row), flush=True)
    return rows


# ------------------------------------------------------------------------------------------- output


def describe(p: Problem, row: dict) -> str:
    def rates(prefix: str) -> str:
        if f"{prefix}fwd_ms" not in row:
            return ""
        forward, backward = summary.measured_speed(row, prefix)
        return f"{prefix.rstrip('_') or 'wall'} {forward:.0f}/{backward:.0f}  "

    text = f"{p.name:14}{row['system']:26}" + rates("") + rates("busy_") + rates("graph_")
    if "kept_mib" in row:
        text += f"kept {row['kept_mib']:.0f} peak {row['peak_fwd_mib']:.0f}/"
        text += f"{row['peak_bwd_mib']:.0f} MiB  first {row['first_call_s']:.2f} s"
    if "rel_err" in row:
        text += f"  error {row['rel_err']:.2e}"
    if "out_of_memory" in row:
        text += "  out of memory"
    if "compile_error" in row:
        text += f"  torch.compile failed: {row['compile_error']}"
    return text


def with_anchors(rows: list[dict]) -> dict:
    shapes = [entry["name"] for entry in suite_entries(["paper"])]
    return rounded(summary.summary(rows, summary.load_anchors(), shapes))


def print_kernels(p: Problem, system, pace: Pace) -> None:
    layer = EagerLayer(p, system)
    call_ms = 1e3 * warm_seconds(lambda: layer.backward(layer.forward()))
    calls = profiled_halves(layer.forward, layer.backward, call_ms, pace)
    for part in ("forward", "backward"):
        print(f"{p.name} {system.name} {part}: us per call, launches per call, kernel")
        for us, launches, name in kernel_table([getattr(call, part) for call in calls]):
            print(f"{us:10.1f} {launches:6.1f}  {name[:110]}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--suite", action="append", help="suites of bench/problems.json (paper)")
    add("--problem", action="append", help="only problems of this name")
    add("--system", action="append", choices=SYSTEMS, help="default: all")
    add("--seconds", type=float, default=Pace.seconds, help="per timed figure and run")
    add("--settle", type=float, default=Pace.settle, help="seconds of load before each figure")
    add("--rest", type=float, default=Pace.rest, help="idle seconds before that")
    add("--runs", type=int, default=1, help="of all times; their medians are recorded")
    add("--kernels", action="store_true", help="print the kernels of sonicmoe, or of --system")
    add("--no-check", action="store_true", help="skip the float64 samples")
    add(
        "--compile-only",
        action="store_true",
        help="fill inductor's cache, in processes side by side",
    )
    add("--compile-workers", type=int, default=6, help="most processes at once")
    add("--compile-limit", type=float, default=120, help="seconds for one shape")
    add("--output", type=Path, help="write the JSON record here")
    parsed = parser.parse_args(arguments)
    if min(parsed.runs, parsed.compile_workers) < 1:
        parser.error("--runs and --compile-workers start at 1")
    parsed.pace = Pace(parsed.seconds, parsed.settle, parsed.rest)
    return parsed


def compile_ahead(entries: list[dict], arguments: argparse.Namespace) -> int:
    free, _ = torch.cuda.mem_get_info()
    outcomes = compilation.compile_all(
        entries, arguments.compile_workers, arguments.compile_limit, free
    )
    return int(any(outcome != "done" for outcome in outcomes.values()))


def main() -> int:
    arguments = parse_arguments()
    require_gpu()
    entries = suite_entries(arguments.suite or ["paper"], arguments.problem)
    if arguments.compile_only:
        return compile_ahead(entries, arguments)
    begin = time.perf_counter()
    import sonicmoe_cpp  # noqa: F401  (timed)

    record = new_record(import_s=rounded(time.perf_counter() - begin), runs=arguments.runs)
    names = arguments.system or (["sonicmoe"] if arguments.kernels else None)
    systems = systems_named(names)
    print(f"{record['device']}, torch {torch.__version__}; model TFLOP/s forward/backward")
    for entry in entries:
        problem = Problem(entry["name"], tuple(entry["shape"]))
        if arguments.kernels:
            for system in systems:
                print_kernels(problem, system, arguments.pace)
            continue
        begin = time.perf_counter()
        record["rows"] += bench_problem(problem, systems, arguments)
        record["summary"] = with_anchors(record["rows"])
        write_record(record, arguments.output)
        print(f"{problem.name:14}{time.perf_counter() - begin:.1f} s", flush=True)
        del problem
    if "summary" in record:
        print(summary.describe(record["summary"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
