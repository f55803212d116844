"""Variants of the products for few large experts, and of the weight gradients of small batches, in
turns in one process (docs/lab/M23.md). A variant is what SONICMOE_M23 holds: s sorted rows, l late
stores, e evict first, w or W products of long reductions in step, t early release in tiles of at
most 64 rows; "" and "=" are the kernels as they are.

    python lab/coarse.py bits                     # results of all variants, bit for bit
    python lab/coarse.py turns --rounds 2         # the suite `coarse`, beside cuBLAS
    python lab/coarse.py small                    # Qwen3-30B-A3B, T 1024 and 2048; plain traffic
    python lab/coarse.py once --problem DBRX      # one call, for ncu
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.compare_builds import PowerLog, mean_between, short_name, turns
from bench.layer import EagerLayer
from bench.lib.oracle import Oracle
from bench.lib.problem import Problem, suite_entries
from bench.lib.profile import busy_by_name, busy_ms, device_spans, profiled_halves
from bench.lib.timing import Pace, require_gpu
from bench.systems import Cublas, SonicMoE

COARSE = ["", "l", "s", "w", "W", "t", "swt", "="]
PRODUCTS = ["up", "down", "dH", "dX~", "dW2", "dW1", "copies", "rest"]
FEW = "8 of 128 experts have rows"
CUBLAS_FORWARD, CUBLAS_BACKWARD = ["up", "down"], ["dH", "dX~", "dW2", "dW1"]


def choose(variant: str) -> None:
    os.environ["SONICMOE_M23"] = variant.replace("=", "")


def product_of(kernel: str) -> str:
    short = short_name(kernel)
    for start, name in {
        "Up<": "up", "GradH<": "dH", "sort_rows": "copies",
        "Rows<256, 0": "down", "Rows<256, 1": "dX~", "StepRows<256, 0": "down",
        "StepRows<256, 1": "dX~",
    }.items():  # fmt: skip
        if short.startswith(start):
            return name
    if "WeightGradient<256, 0" in short:
        return "dW2"
    return "dW1" if "WeightGradient<256, 1" in short else "rest"


def by_product(spans) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, us in busy_by_name(spans).items():
        totals[product_of(name)] = totals.get(product_of(name), 0.0) + us
    return totals


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row.get(key, 0.0) for row in rows) for key in rows[0]}


class Power:
    """Means of power and clock between begin() and end(), where the card tells."""

    def __init__(self) -> None:
        gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}".replace("GPU-GPU-", "GPU-")
        try:
            self.log = PowerLog(gpu)
        except OSError:
            self.log = None

    def since(self, begin: float) -> dict[str, float]:
        return mean_between(list(self.log.readings), begin, time.monotonic()) if self.log else {}

    def stop(self) -> None:
        if self.log:
            self.log.stop()


# ------------------------------------------------------------------------------------------- bits


def results(layer: EagerLayer, variant: str) -> list[torch.Tensor]:
    choose(variant)
    y = layer.forward()
    return [y, *layer.backward(y)]


def differing(base: list[torch.Tensor], other: list[torch.Tensor]) -> list[str]:
    names = ["y", "dX", "dWr", "dW1", "dW2"]
    pairs = zip(names, base, other, strict=True)
    return [
        name for name, a, b in pairs if not torch.equal(a.view(torch.int16), b.view(torch.int16))
    ]


def bits() -> int:
    """Experts of few rows and of none, rows of NaN, tiles past d."""
    shapes = {
        "few rows": (256, 320, 512, 64, 2), "odd": (3000, 448, 768, 24, 3),
        "long": (4096, 1536, 4608, 8, 2), "one expert": (700, 512, 512, 4, 1),
        "many": (8192, 2048, 768, 128, 8), "half steps": (2080, 1024, 256, 32, 1),
    }  # fmt: skip
    failures = 0
    for name, shape in shapes.items():
        for poison in (False, True):
            p = Problem(name, shape)
            if poison:
                with torch.no_grad():
                    p.grad[0] = float("nan")
                    p.x[1] = float("nan")
            layer = EagerLayer(p, SonicMoE("sonicmoe"))
            base = results(layer, "")
            for variant in ("=", "l", "le", "s", "se", "w", "W", "t", "swt"):
                wrong = differing(base, results(layer, variant))
                failures += bool(wrong)
                state = "equal" if not wrong else f"DIFFER: {', '.join(wrong)}"
                print(f"bits {name}{' with NaN' if poison else ''} {shape} {variant}: {state}")
            if name == "many" and not poison:
                choose("")
                errors = Oracle(p, *p.routing()).errors(p, SonicMoE("sonicmoe"), *p.routing())
                print("     against float64:", {key: round(e, 5) for key, e in errors.items()})
            nan = float(base[3].isnan().float().mean())
            print(f"     dW1 is NaN in {nan:.3f}", flush=True)
    return failures


# ------------------------------------------------------------------------------------------ coarse


def cublas_row(products, pace: Pace, call_ms: float) -> dict[str, float]:
    calls = profiled_halves(products.forward, lambda _: products.backward(), call_ms, pace)
    rows = []
    for call in calls:
        row = {"fwd": 1e3 * busy_ms(call.forward), "bwd": 1e3 * busy_ms(call.backward)}
        for spans, names in ((call.forward, CUBLAS_FORWARD), (call.backward, CUBLAS_BACKWARD)):
            if len(spans) == len(names):
                row |= {n: s.end - s.start for n, s in zip(names, spans, strict=True)}
        rows.append(row)
    return {key: us * products.scale for key, us in median_of(rows).items()}


def our_row(layer: EagerLayer, pace: Pace, call_ms: float) -> dict[str, float]:
    rows = []
    for call in profiled_halves(layer.forward, layer.backward, call_ms, pace):
        row = dict.fromkeys(PRODUCTS, 0.0) | by_product(call.forward + call.backward)
        rows.append(row | {"fwd": 1e3 * busy_ms(call.forward), "bwd": 1e3 * busy_ms(call.backward)})
    return median_of(rows)


def print_shape(name: str, rows: dict[str, list[dict[str, float]]]) -> None:
    columns = [*PRODUCTS, "fwd", "bwd", "mhz", "watts"]
    print(f"\n{name:22}" + "".join(f"{c:>10}" for c in columns))
    means = {
        v: {c: statistics.mean(r.get(c, 0.0) for r in rs) for c in columns}
        for v, rs in rows.items()
    }
    for v, mean in means.items():
        print(f"  {v or 'today':20}" + "".join(f"{mean[c]:10.0f}" for c in columns))
    for against in ("", "cublas"):
        base = means.get(against)
        if base is None:
            continue
        print(f"  {against or 'today'} / variant")
        for v, mean in means.items():
            cells = (
                f"{base[c] / mean[c]:10.3f}" if mean[c] and base[c] else f"{'':>10}"
                for c in columns[:-2]
            )
            print(f"    {v or 'today':18}" + "".join(cells))
    sys.stdout.flush()


def coarse(arguments: argparse.Namespace) -> dict:
    pace = Pace(arguments.seconds, arguments.settle, 0.0)
    record, begin = {}, time.monotonic()
    for entry in suite_entries(["coarse"], arguments.problem):
        if time.monotonic() - begin > arguments.deadline:
            print(f"{entry['name']}: not begun, {arguments.deadline} s are over")
            continue
        p = Problem(entry["name"], tuple(entry["shape"]))
        layer = EagerLayer(p, SonicMoE("sonicmoe"))
        base = results(layer, "")
        for variant in arguments.variant:
            if variant not in ("", "="):
                wrong = differing(base, results(layer, variant))
                print(f"bits {p.name} {variant}: {'DIFFER ' + str(wrong) if wrong else 'equal'}")
        del base
        torch.cuda.empty_cache()
        products = Cublas.products(p)
        call_ms = 9 * p.flops / 3 / 6e14 * 1e3
        rows: dict[str, list] = {v: [] for v in [*arguments.variant, "cublas"]}
        power = Power()
        for variant in turns([*arguments.variant, "cublas"], arguments.rounds):
            start = time.monotonic()
            if variant == "cublas":
                row = cublas_row(products, pace, call_ms)
            else:
                choose(variant)
                row = our_row(layer, pace, call_ms)
            rows[variant].append(row | power.since(start + arguments.settle / 2))
        power.stop()
        print_shape(p.name, rows)
        record[p.name] = rows
        del layer, products, p
        torch.cuda.empty_cache()
    return record


# ------------------------------------------------------------------------------------ small batches


def small_calls(tokens: int, traffic: dict) -> list[tuple[str, int, Callable[[], object]]]:
    """Names, bytes of plain traffic (0: kernels are named one by one), calls."""
    layer = EagerLayer(Problem("", (tokens, 2048, 768, 128, 8)), SonicMoE("sonicmoe"))
    few, system = Problem("", (128, 2048, 768, 128, 8)), SonicMoE("sonicmoe")
    ids = torch.arange(8, device="cuda").repeat(128, 1)
    weights = torch.full((128, 8), 0.125, device="cuda")

    def empty_experts() -> None:
        y = system.experts(few, ids, weights)
        torch.autograd.grad(y, (few.x, few.w1, few.w2), few.grad)

    calls = [("layer", 0, lambda: layer.backward(layer.forward()))]
    for name, (a, b) in traffic.items():
        values, size = a.view(torch.float32), a.numel()
        calls += [
            (f"memset {name}", size, a.zero_),
            (f"fill_ {name}", size, partial(values.fill_, 1.5)),
            (f"copy {name}", 2 * size, partial(b.copy_, a)),
            (f"sum {name}", size, values.sum),
            (f"amax {name}", size, values.amax),
        ]
    return [*calls, (FEW, 0, empty_experts)]


def small_row(calls: list) -> dict[str, float]:
    """Microseconds and TB/s, means of twenty turns through the calls."""
    counted = 20
    times: dict[str, float] = {}

    def run(count: int) -> None:
        for _ in range(count):
            for _, _, call in calls:
                torch.cuda._sleep(1)
                call()

    run(30)
    index = -1
    for span in device_spans(lambda: run(counted)):
        if "spin_kernel" in span.name:
            index += 1
            continue
        name, size, _ = calls[index % len(calls)]
        key = name if size else f"{name}: {product_of(span.name)}"
        times[key] = times.get(key, 0.0) + (span.end - span.start) / counted
    if index + 1 != counted * len(calls):
        raise RuntimeError(f"{index + 1} marks, not {counted * len(calls)}")
    row = dict(times)
    for name, size, _ in calls:
        if size:
            row[f"{name} TB/s"] = size / times[name] * 1e-6
            continue
        for product, size in (("dW2", 2 * 128 * 768 * 2048), ("dW1", 4 * 128 * 768 * 2048)):
            row[f"{name}: {product} TB/s"] = size / times[f"{name}: {product}"] * 1e-6
    return row


def small(arguments: argparse.Namespace) -> dict:
    """Kernels of the layer, plain traffic of as many bytes as the weights have, and the weight
    gradients of experts of which nearly none has rows, one after the other again and again."""
    sizes = {"403 MB": 2 * 128 * 768 * 2048, "805 MB": 4 * 128 * 768 * 2048}
    traffic = {
        name: tuple(torch.zeros(n, dtype=torch.uint8, device="cuda") for _ in range(2))
        for name, n in sizes.items()
    }
    record: dict = {}
    for tokens in (1024, 2048):
        calls = small_calls(tokens, traffic)
        rows: dict[str, list] = {}
        for variant in turns(["", "l", "le", "t", "="], arguments.rounds):
            choose(variant)
            rows.setdefault(variant or "today", []).append(small_row(calls))
        record[tokens] = rows
        print(f"\nQwen3-30B-A3B, T {tokens:<25}" + "".join(f"{v:>22}" for v in rows))
        for key in next(iter(rows.values()))[0]:
            digits = 3 if "TB/s" in key else 1
            cells = (
                " ".join(f"{row.get(key, 0.0):.{digits}f}" for row in of_variant)
                for of_variant in rows.values()
            )
            print(f"  {key:42}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=["bits", "turns", "small", "once"])
    add("--problem", action="append")
    add("--variant", action="append", help="default: all of turns'")
    add("--rounds", type=int, default=2)
    add("--settle", type=float, default=0.35)
    add("--seconds", type=float, default=0.25)
    add("--deadline", type=float, default=float("inf"), help="seconds; no shape begins later")
    add("--output", type=Path)
    arguments = parser.parse_args()
    arguments.variant = arguments.variant or COARSE
    require_gpu()
    if arguments.what == "bits":
        return 1 if bits() else 0
    if arguments.what == "once":
        (entry,) = suite_entries(["coarse"], arguments.problem)
        p = Problem(entry["name"], tuple(entry["shape"]))
        layer = EagerLayer(p, SonicMoE("sonicmoe"))
        for variant in arguments.variant:
            choose(variant)
            layer.backward(layer.forward())
        torch.cuda.synchronize()
        return 0
    record = coarse(arguments) if arguments.what == "turns" else small(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
