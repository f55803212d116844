"""The GPU layer beyond its speed at even routing: limits, skew, token rounding, routing's share.

    limit     forward and backward under falling workspace limits, with the scratch they take
    skew      the experts alone for uneven routings; cost = time / (time of balanced rows x rows in
              tiles of 64 / the same of balanced rows), wanted <= 1.3
    rounding  token rounding beside top-K at the sparse settings, by the rows each computes
    routing   time of routing, row lists and rounding, without the router's products, as a share of
              the layer

Times are wall milliseconds, backward = both minus forward, variants taking turns; `routing` uses
the kernels' own times (CUPTI), an overlap counted for the earlier kernel.

    python -m bench.cases --output bench/results/h100-$(date +%F)-cases.json
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sonicmoe_cpp as sm
import torch

from bench.lib import routings
from bench.lib.problem import GIB, MIB, Problem, problem_named
from bench.lib.profile import busy_us
from bench.lib.record import new_record, rounded, write_record
from bench.lib.timing import Call, in_turns_ms, require_gpu, warm_seconds

LIMITS = (None, 4 * GIB, 2 * GIB, 3 * GIB // 2, GIB, 3 * GIB // 4, GIB // 2)
LIMIT_PROBLEM = "30B-n256"
SKEW_PROBLEMS = ("7B-n256", "30B-n1024", "Qwen3-Next")
SKEW_TILE = 64
MOST_COST = 1.3
SKEWS = {
    "balanced": routings.balanced_ids,
    "uniform": routings.uniform_ids,
    "zipf": routings.zipf_ids,
    "hot-expert": routings.hot_expert_ids,
}
SPARSE_SHAPES = (
    *((16384, 1536, 256, experts, 8) for experts in (64, 128, 256, 512)),
    *((16384, 4096, 512, experts, 4) for experts in (32, 64, 128, 256)),
)
ROUTERS = {
    "topk": {"router": "topk"},
    "token_rounding": {"router": "token_rounding", "tile": 128, "policy": "nearest"},
}
ROUTING_PROBLEMS = ("7B-n256", "30B-n256", "30B-n1024", "120B-n2048")

# The kernels of src/cuda, by what they are for. One that is missing here is named in the row.
KERNELS = {
    "routing": (
        "route_kernel",
        "topk_backward_kernel",
        "gradient_terms_kernel",  # writes the products' operand too
        "weight_backward_kernel",
        "scatter_pairs_kernel",
    ),
    "lists": (
        "count_experts",
        "scan_blocks",
        "clamp_offsets",
        "place_pairs",
        "order_pairs",
        "make_tables",
    ),
    "rounding": (
        "rank_kernel",
        "count_rows_kernel",
        "round_rows_kernel",
        "write_rows_kernel",
    ),
    "fills": ("Memset",),  # of row counts, chosen bits and the logits' gradient
    "router_products": (
        "simt_gemm_kernel",
        "split_gemm_kernel",
        "split_terms_kernel",
        "write_lists_kernel",
        "add_parts_kernel",
        "column_sums_kernel",
    ),
    "products": ("grouped_gemm_kernel",),  # the experts' and most of the router's
    "sums": (
        "aggregate_kernel",
        "zero_tail_kernel",
        "sum_partials_kernel",
        "finish_weight_gradient_kernel",
        "bias_gradient_kernel",
    ),
    "losses": ("loss_kernel", "loss_gradient_kernel", "update_expert_bias_kernel", "add_kernel"),
}
OVERHEAD = ("routing", "lists", "rounding", "fills")
PART_OF = {kernel: part for part, kernels in KERNELS.items() for kernel in kernels}
KERNEL_NAME = re.compile(rf"\b({'|'.join(PART_OF)})\b")

Rows = Iterator[dict]
Times = dict[tuple, float]  # milliseconds by (variant, "forward" or "both")


def outputs(p: Problem, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [T, d], logits [T, E] and rows per expert [E] of the whole layer."""
    return sm.moe_layer(p.x, p.router, p.w1, p.w2, p.shape[4], scoring="topk_softmax", **options)


def layer(p: Problem, **options) -> torch.Tensor:
    return outputs(p, **options)[0]


def two_calls(run: Callable[[], torch.Tensor], leaves: tuple, grad: torch.Tensor) -> dict:
    return {"forward": run, "both": lambda: torch.autograd.grad(run(), leaves, grad)}


def fwd_bwd(times: Times, variant) -> tuple[float, float]:
    forward = times[variant, "forward"]
    return forward, times[variant, "both"] - forward


# ------------------------------------------------------------------------------------------- limit


def demanded_bytes(call: Call) -> int | None:
    """What the call demands of its workspace_limit; None where it runs."""
    try:
        call()
    except RuntimeError as error:
        demand = re.search(r"workspace_limit.*at least (\d+) bytes", str(error), re.DOTALL)
        if not demand:
            raise
        return int(demand[1])
    return None


def accepted_calls(p: Problem, limits: list) -> tuple[dict[tuple, Call], dict]:
    """The calls that run, by (limit, name), and the bytes demanded by refused ones, by limit. What
    is demanded becomes one more of `limits`, so that the least one is measured too."""
    calls, demands = {}, {}
    for limit in limits:
        run = partial(layer, p, workspace_limit=limit)
        for name, call in two_calls(run, p.leaves, p.grad).items():
            demand = demanded_bytes(call)
            if demand is None:
                calls[limit, name] = call
                continue
            demands[limit] = demand
            if demand not in limits:
                limits.append(demand)
            break
    return calls, demands


def scratch_mib(call: Call) -> float:
    """Most that the allocator held during the call beyond what it holds with the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    held = torch.cuda.memory_allocated()
    del result
    return (torch.cuda.max_memory_allocated() - held) / MIB


def limit_row(p: Problem, limit: int | None, calls: dict[tuple, Call], times: Times) -> dict:
    """Without bwd_ms where backward refuses the limit, without both where forward does."""
    row = {"shape": p.name, "limit_mib": None if limit is None else limit / MIB}
    if (limit, "forward") not in times:
        return row
    forward = calls[limit, "forward"]
    free_forward, free_backward = fwd_bwd(times, None)
    row["fwd_ms"] = times[limit, "forward"]
    row["fwd_ratio"] = row["fwd_ms"] / free_forward
    row["peak_fwd_mib"] = scratch_mib(forward)
    if (limit, "both") in times:
        row["bwd_ms"] = fwd_bwd(times, limit)[1]
        row["bwd_ratio"] = row["bwd_ms"] / free_backward
        row["ratio"] = times[limit, "both"] / times[None, "both"]
        # retain_graph keeps what forward saved out of the difference.
        backward = partial(torch.autograd.grad, forward(), p.leaves, p.grad, retain_graph=True)
        row["peak_bwd_mib"] = scratch_mib(backward)
    return row


def limit_rows(seconds: float) -> Rows:
    p = problem_named(LIMIT_PROBLEM)
    limits = list(LIMITS)
    calls, demands = accepted_calls(p, limits)
    times = in_turns_ms(calls, seconds)
    for limit in sorted(limits, key=lambda limit: -(limit or float("inf"))):
        row = limit_row(p, limit, calls, times)
        yield row | ({"demanded_mib": demands[limit] / MIB} if limit in demands else {})


# -------------------------------------------------------------------------------------------- skew


def skew_rows(seconds: float) -> Rows:
    for name in SKEW_PROBLEMS:
        yield from skew_rows_of(problem_named(name), seconds)


def skew_rows_of(p: Problem, seconds: float) -> Rows:
    tokens, _, _, experts, top_k = p.shape
    generator = torch.Generator("cuda").manual_seed(0)
    weights = torch.randn(tokens, top_k, device="cuda").softmax(-1).requires_grad_()
    leaves = (p.x, p.w1, p.w2, weights)
    calls, rows = {}, {}
    for skew, draw in SKEWS.items():
        ids = routings.shuffled(draw(tokens, experts, top_k, generator), experts, generator)
        rows[skew] = routings.rows_per_expert(ids, experts)
        run = partial(sm.moe, p.x, p.w1, p.w2, ids, weights)
        for part, call in two_calls(run, leaves, p.grad).items():
            calls[skew, part] = call
    times = in_turns_ms(calls, seconds)
    for skew in SKEWS:
        yield {"shape": p.name, "skew": skew} | skew_figures(times, rows, skew)


def skew_figures(times: Times, rows: dict[str, torch.Tensor], skew: str) -> dict:
    """cost: time over the balanced time scaled by the padded rows; wanted <= MOST_COST."""
    padded = routings.padded_rows(rows[skew], SKEW_TILE)
    ratio = padded / routings.padded_rows(rows["balanced"], SKEW_TILE)
    forward, backward = fwd_bwd(times, skew)
    even_forward, even_backward = fwd_bwd(times, "balanced")
    cost = (forward + backward) / (even_forward + even_backward) / ratio
    return {
        "most_rows": int(rows[skew].max()),
        "padded_rows": padded,
        "padded_ratio": ratio,
        "fwd_ms": forward,
        "bwd_ms": backward,
        "cost_fwd": forward / even_forward / ratio,
        "cost_bwd": backward / even_backward / ratio,
        "cost": cost,
        "met": cost <= MOST_COST,
    }


# ---------------------------------------------------------------------------------------- rounding


def rounding_rows(seconds: float) -> Rows:
    for shape in SPARSE_SHAPES:
        p = Problem(f"d{shape[1]}-E{shape[3]}", shape)
        calls = {
            (router, part): call
            for router, options in ROUTERS.items()
            for part, call in two_calls(partial(layer, p, **options), p.leaves, p.grad).items()
        }
        times = in_turns_ms(calls, seconds)
        figures = {router: rounding_figures(p, times, router) for router in ROUTERS}
        for router, row in figures.items():
            gains = {
                f"gain_{part}": row[f"{part}_tflops"] / figures["topk"][f"{part}_tflops"]
                for part in ("fwd", "bwd")
            }
            yield {"shape": p.name, **p.sizes, "router": router} | row | gains


def rounding_figures(p: Problem, times: Times, router: str) -> dict:
    """Model TFLOP/s count the rows that were routed, not the padding of their tiles."""
    rows = outputs(p, **ROUTERS[router])[2]
    forward, backward = fwd_bwd(times, router)
    flops = 6.0 * int(rows.sum()) * p.sizes["n"] * p.sizes["d"]
    return {
        "rows": int(rows.sum()),
        "padded_64": routings.padded_rows(rows, 64),
        "padded_128": routings.padded_rows(rows, 128),
        "fwd_ms": forward,
        "bwd_ms": backward,
        "fwd_tflops": flops / forward / 1e9,
        "bwd_tflops": 2 * flops / backward / 1e9,
    }


# ----------------------------------------------------------------------------------------- routing


def routing_rows(seconds: float) -> Rows:
    for name in ROUTING_PROBLEMS:
        p = problem_named(name)
        for router, options in ROUTERS.items():
            both = two_calls(partial(layer, p, **options), p.leaves, p.grad)["both"]
            warm_seconds(both)
            kernels = by_kernel(busy_us(both))
            yield {"shape": name, "router": router} | overhead(kernels) | {"kernels": kernels}


def by_kernel(times: dict[str, float]) -> dict[str, float]:
    """Microseconds by the short name of a kernel of KERNELS; others keep the profiler's name."""
    short: dict[str, float] = {}
    for name, time in times.items():
        match = KERNEL_NAME.search(name)
        key = match[1] if match else name[:100]
        short[key] = short.get(key, 0.0) + time
    return short


def overhead(kernels: dict[str, float]) -> dict:
    """Microseconds by part of forward and backward, and what OVERHEAD has of all. `unknown` are
    kernels of this library that KERNELS lacks: their time counts as `other`."""
    parts = dict.fromkeys((*OVERHEAD, "other"), 0.0)
    for kernel, time in kernels.items():
        part = PART_OF.get(kernel, "other")
        parts[part] = parts.get(part, 0.0) + time
    layer_us = sum(kernels.values())
    overhead_us = sum(parts[part] for part in OVERHEAD)
    figures = {"layer_us": layer_us, "overhead_us": overhead_us, "share": overhead_us / layer_us}
    unknown = [kernel for kernel in kernels if "sonicmoe" in kernel]
    if unknown:
        figures["unknown"] = unknown
    return figures | {f"{part}_us": time for part, time in parts.items()}


# -------------------------------------------------------------------------------------------- main

CASES: dict[str, Callable[[float], Rows]] = {
    "limit": limit_rows,
    "skew": skew_rows,
    "rounding": rounding_rows,
    "routing": routing_rows,
}


def describe(row: dict) -> str:
    figures = (f"{key} {value}" for key, value in row.items() if not isinstance(value, dict))
    return "  ".join(figures)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--seconds", type=float, default=0.25, help="per timed figure")
    parser.add_argument("--output", type=Path, help="write the JSON record here")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments()
    require_gpu()
    record = new_record()
    print(f"{record['device']}, torch {torch.__version__}")
    for case in arguments.case or CASES:
        for row in CASES[case](arguments.seconds):
            record["rows"].append({"case": case} | rounded(row))
            print(describe(record["rows"][-1]), flush=True)
            write_record(record, arguments.output)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
