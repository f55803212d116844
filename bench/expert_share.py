"""One rank's share of the experts under expert parallelism: its compute, without an exchange.

Every rank sees the tokens of all (x [EP T, d]) and computes those of its E / EP experts; the ids of
the others are dropped slots. How many rows that makes stays about T K; how many tokens it is asked
about grows with EP. Three ways, in turns:

    slots      H and all scratch have room for every slot handed over
    max_rows   for --capacity times T K rows
    absent     as well, and rows of y and dX of tokens without rows are not written

`sums_us`: kernel times (CUPTI) of the sums over a token's rows, forward and backward, with the list
of tokens that they visit. `kept_mib`: what a forward keeps beside its inputs and y.

    python -m bench.expert_share --output bench/results/expert-share-h200-$(date +%F).json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import sonicmoe_cpp as sm
import torch

from bench.lib.problem import MIB, shape_named
from bench.lib.profile import busy_us
from bench.lib.record import new_record, rounded, write_record
from bench.lib.timing import in_turns_ms, require_gpu

PROBLEMS = ("Qwen3-30B-A3B", "7B-n256")
SIZES = (1, 2, 4, 8)
SUMS = ("aggregate_", "list_tokens")


class Share:
    """The inputs of rank 0 of `size`."""

    def __init__(self, shape: tuple[int, int, int, int, int], size: int) -> None:
        tokens, d, n, experts, top_k = shape
        own = experts // size

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            return values.mul_(scale).requires_grad_()

        torch.manual_seed(0)
        self.x = normal(size * tokens, d)
        self.w1 = normal(own, 2 * n, d, scale=d**-0.5)
        self.w2 = normal(own, d, n, scale=n**-0.5)
        scores = torch.rand(size * tokens, experts, device="cuda")
        self.weights, self.ids = scores.topk(top_k, dim=1)
        self.weights.requires_grad_()
        self.grad = torch.randn_like(self.x)
        self.rows = int((self.ids < own).sum())
        self.flops = 6 * self.rows * d * n  # of a forward

    def forward(self, **options: object) -> torch.Tensor:
        return sm.moe(self.x, self.w1, self.w2, self.ids, self.weights, **options)

    def both(self, **options: object) -> object:
        leaves = (self.x, self.w1, self.w2, self.weights)
        return torch.autograd.grad(self.forward(**options), leaves, self.grad)

    def kept_mib(self, **options: object) -> float:
        before = torch.cuda.memory_allocated()
        y = self.forward(**options)
        return (torch.cuda.memory_allocated() - before - y.nbytes) / MIB


def rows_of(name: str, size: int, capacity: float, seconds: float) -> list[dict]:
    shape = shape_named(name)
    share = Share(shape, size)
    bound = {"max_rows": int(capacity * shape[0] * shape[4])}
    ways = {"slots": {}, "max_rows": bound, "absent": bound | {"zero_absent_tokens": False}}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for way, options in ways.items():
        calls[way, "forward"] = lambda options=options: share.forward(**options)
        calls[way, "both"] = lambda options=options: share.both(**options)
    ms = in_turns_ms(calls, seconds)
    found = []
    for way, options in ways.items():
        forward, both = ms[way, "forward"], ms[way, "both"]
        times = busy_us(calls[way, "both"])
        sums = [us for kernel, us in times.items() if any(name in kernel for name in SUMS)]
        found.append(
            {
                "problem": name, "ep": size, "way": way, "rows": share.rows,
                "forward_ms": forward, "backward_ms": both - forward,
                "forward_tflops": share.flops / forward / 1e9,
                "backward_tflops": 2 * share.flops / (both - forward) / 1e9,
                "sums_us": sum(sums),
                "kept_mib": share.kept_mib(**options),
            }
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", action="append", help=f"one of problems.json ({PROBLEMS})")
    parser.add_argument("--ep", type=int, nargs="+", default=SIZES, help="ranks that share experts")
    parser.add_argument("--capacity", type=float, default=1.25, help="max_rows over T K")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each call")
    parser.add_argument("--output", type=Path, help="the record, JSON")
    options = parser.parse_args()
    require_gpu()
    record = new_record(capacity=options.capacity)
    for name in options.problem or PROBLEMS:
        for size in options.ep:
            for row in rows_of(name, size, options.capacity, options.seconds):
                record["rows"].append(rounded(row))
                print(*(f"{key}={value}" for key, value in rounded(row).items()), flush=True)
    write_record(record, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
