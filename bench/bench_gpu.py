"""The whole layer with its router on a GPU: sonicmoe_cpp beside torch grouped_mm and cuBLAS.

Every system computes logits, top-K, softmax and SwiGLU experts in bfloat16, with all gradients.
Figures per shape and system:

    fwd_ms, bwd_ms            wall: median over back-to-back eager calls; backward = both minus forward
    busy_fwd_ms, busy_bwd_ms  time the GPU is busy: union of the kernels' intervals (CUPTI)
    graph_fwd_ms, graph_bwd_ms  replay of a CUDA graph of the same call (sonicmoe only)
    kept_mib                  held by the allocator from forward to backward, beside x and weights
    peak_fwd_mib, peak_bwd_mib  most allocated during each, likewise
    first_call_s              first forward and backward at this shape in this process
    rel_err                   worst relative RMS error of y, dx, dw1, dw2 against float64 on samples

cublas-bmm is the dense, balanced product of the same FLOPs alone: no gather, activation or sum.
torch-grouped_mm-compiled, on request, is the torch layer under torch.compile as a whole.

    python bench/bench_gpu.py --suite paper --output bench/results/h100-$(date +%F).json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_common import (
    BF16,
    Call,
    Problem,
    busy_ms,
    device_events,
    memory,
    new_record,
    require_gpu,
    rounded,
    suite_entries,
    wall_ms,
    write_record,
)

SAMPLED_TOKENS = 64
SAMPLED_COLUMNS = 64

# ----------------------------------------------------------------------------------------- systems


class SonicMoE:
    name = "sonicmoe"

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe(p.x, p.w1, p.w2, ids, weights)

    def layer(self, p: Problem) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe_layer(
            p.x, p.router, p.w1, p.w2, p.shape[4], scoring="topk_softmax"
        )[0]


def swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_sum(y, weights, inverse, top_k: int) -> torch.Tensor:
    """Undoes the sort, weighs the rows and sums a token's."""
    rows = y.index_select(0, inverse).unflatten(0, (-1, top_k))
    return (rows * weights.to(y.dtype).unsqueeze(-1)).sum(1)


def grouped_experts(x, w1, w2, ids, weights, activate=swiglu, combine=weighted_sum) -> torch.Tensor:
    """Sort, gather, two grouped GEMMs, SwiGLU, weigh, undo the sort, sum."""
    experts, top_k = w1.shape[0], ids.shape[1]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=x.device)
    ends = torch.histc(flat.float(), experts, 0, experts - 1).cumsum(0).int()
    # index_select, not indexing: its backward adds rows instead of sorting indices.
    rows = x.index_select(0, order // top_k)
    h = F.grouped_mm(rows, w1.transpose(1, 2), offs=ends)
    y = F.grouped_mm(activate(h), w2.transpose(1, 2), offs=ends)
    return combine(y, weights, inverse, top_k)


def grouped_layer(
    x, router, w1, w2, top_k: int, activate=swiglu, combine=weighted_sum
) -> torch.Tensor:
    values, ids = F.linear(x, router).float().topk(top_k, dim=-1)
    return grouped_experts(x, w1, w2, ids, values.softmax(-1), activate, combine)


class GroupedMM:
    """torch's grouped_mm, eager but for the pointwise parts, which inductor compiles."""

    name = "torch-grouped_mm"

    def __init__(self) -> None:
        self.pointwise = tuple(torch.compile(f, dynamic=True) for f in (swiglu, weighted_sum))

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        return grouped_experts(p.x, p.w1, p.w2, ids, weights, *self.pointwise)

    def layer(self, p: Problem) -> torch.Tensor:
        return grouped_layer(p.x, p.router, p.w1, p.w2, p.shape[4], *self.pointwise)


class CompiledGroupedMM:
    """The same layer under torch.compile as a whole, anew for every shape."""

    name = "torch-grouped_mm-compiled"

    def __init__(self) -> None:
        torch._dynamo.config.recompile_limit = 64  # past it torch would silently run eagerly
        self._experts = torch.compile(grouped_experts, dynamic=False)
        self._layer = torch.compile(grouped_layer, dynamic=False)

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        return self._experts(p.x, p.w1, p.w2, ids, weights)

    def layer(self, p: Problem) -> torch.Tensor:
        return self._layer(p.x, p.router, p.w1, p.w2, p.shape[4])


class Cublas:
    """Only the six products, batched and balanced: rows = T*K/E per expert."""

    name = "cublas-bmm"

    def __init__(self, p: Problem) -> None:
        tokens, d, n, experts, top_k = p.shape
        rows = max(1, tokens * top_k // experts)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device="cuda", dtype=BF16)

        self.x, self.grad = normal(experts, rows, d), normal(experts, rows, d)
        self.h, self.a = normal(experts, rows, 2 * n), normal(experts, rows, n)
        self.w1, self.w2 = p.w1.detach(), p.w2.detach()
        self.scale = tokens * top_k / (rows * experts)

    def forward(self) -> None:
        torch.bmm(self.x, self.w1.mT)
        torch.bmm(self.a, self.w2.mT)

    def backward(self) -> None:
        torch.bmm(self.grad, self.w2)
        torch.bmm(self.h, self.w1)
        torch.bmm(self.grad.mT, self.a)
        torch.bmm(self.h.mT, self.x)


SYSTEMS = {
    "sonicmoe": SonicMoE,
    "torch-grouped_mm": GroupedMM,
    "torch-grouped_mm-compiled": CompiledGroupedMM,
    "cublas-bmm": lambda: "cublas-bmm",
}
DEFAULT_SYSTEMS = ("sonicmoe", "torch-grouped_mm", "cublas-bmm")


# ------------------------------------------------------------------------------------- measurement


def print_kernels(title: str, call: Call, repeats: int = 5) -> None:
    """Microseconds per call of each kernel, the longest first."""
    totals: dict[str, list[float]] = {}
    for event in device_events(call, repeats):
        totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    print(f"{title}: us per call, launches per call, kernel")
    for name, spans in sorted(totals.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(spans) / repeats:10.1f} {len(spans) / repeats:6.1f}  {name[:110]}")


def graph_ms(call: Call, repeats: int = 20) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return wall_ms(graph.replay, repeats * 1e-2)


def measure(p: Problem, system, seconds: float) -> dict:
    def forward() -> torch.Tensor:
        return system.layer(p)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(system.layer(p), p.leaves, p.grad)

    torch.cuda.synchronize()
    begin = time.perf_counter()
    both()
    torch.cuda.synchronize()
    row = {"first_call_s": time.perf_counter() - begin}
    row |= memory(p, system.layer)
    row["fwd_ms"] = wall_ms(forward, seconds)
    row["bwd_ms"] = wall_ms(both, seconds) - row["fwd_ms"]
    row["busy_fwd_ms"] = busy_ms(forward)
    row["busy_bwd_ms"] = busy_ms(both) - row["busy_fwd_ms"]
    if system.name == "sonicmoe":
        row["graph_fwd_ms"] = graph_ms(forward)
        row["graph_bwd_ms"] = graph_ms(both) - row["graph_fwd_ms"]
    return row


# ---------------------------------------------------------------------------------------- accuracy


def relative(error: torch.Tensor, exact: torch.Tensor) -> float:
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


class Oracle:
    """float64 values of y and dx for some tokens, of dw1 and dw2 for some rows of one expert."""

    def __init__(self, p: Problem, ids: torch.Tensor, weights: torch.Tensor) -> None:
        tokens, d, n, experts, top_k = p.shape
        self.tokens = torch.linspace(0, tokens - 1, SAMPLED_TOKENS, device="cuda").long()
        self.columns = torch.linspace(0, n - 1, SAMPLED_COLUMNS, device="cuda").long()
        self.outputs = torch.linspace(0, d - 1, SAMPLED_COLUMNS, device="cuda").long()
        self.expert = experts - 1
        rows = [self._row(p, t, ids, weights) for t in self.tokens.tolist()]
        self.y, self.dx = (torch.stack(column) for column in zip(*rows, strict=True))
        self.dw1, self.dw2 = self._weight_gradients(p, ids, weights)

    @staticmethod
    def _row(p: Problem, token: int, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
        x, grad = p.x[token].detach().double(), p.grad[token].double()
        y, dx = torch.zeros_like(x), torch.zeros_like(x)
        for slot, e in enumerate(ids[token].tolist()):
            w1, w2 = p.w1[e].detach().double(), p.w2[e].detach().double()
            gate, up = (w1 @ x).chunk(2)
            s, sigmoid = weights[token, slot].double(), gate.sigmoid()
            y += s * (w2 @ (gate * sigmoid * up))
            da = s * (w2.T @ grad)
            d_gate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
            dx += w1.T @ torch.cat([d_gate, da * gate * sigmoid])
        return y, dx

    def _weight_gradients(self, p: Problem, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
        """dw1 [columns of gate and up, d] and dw2 [outputs, columns] of one expert."""
        n, e, c = p.shape[2], self.expert, self.columns
        token, slot = (ids == e).nonzero(as_tuple=True)
        x, grad = p.x[token].detach().double(), p.grad[token].double()
        s = weights[token, slot].double()[:, None]
        gate, up = x @ p.w1[e, c].detach().double().T, x @ p.w1[e, n + c].detach().double().T
        sigmoid = gate.sigmoid()
        da = s * (grad @ p.w2[e][:, c].detach().double())
        d_gate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
        dw1 = torch.cat([d_gate, da * gate * sigmoid], 1).T @ x
        return dw1, grad[:, self.outputs].T @ (s * gate * sigmoid * up)

    def errors(self, p: Problem, system, ids, weights) -> dict[str, float]:
        y = system.experts(p, ids, weights)
        dx, dw1, dw2 = torch.autograd.grad(y, (p.x, p.w1, p.w2), p.grad)
        n, e, c = p.shape[2], self.expert, self.columns
        ours = {
            "y": (y.detach()[self.tokens], self.y),
            "dx": (dx[self.tokens], self.dx),
            "dw1": (dw1[e, torch.cat([c, n + c])], self.dw1),
            "dw2": (dw2[e][self.outputs][:, c], self.dw2),
        }
        return {name: relative(a.double() - b, b) for name, (a, b) in ours.items()}


def one_routing(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """One routing for every system."""
    with torch.no_grad():
        values, ids = F.linear(p.x, p.router).float().topk(p.shape[4], dim=-1)
    return ids, values.softmax(-1)


# -------------------------------------------------------------------------------------------- main


def measure_cublas(p: Problem, seconds: float) -> dict:
    products = Cublas(p)
    return {
        "fwd_ms": wall_ms(products.forward, seconds) * products.scale,
        "bwd_ms": wall_ms(products.backward, seconds) * products.scale,
    }


def figures_of(p: Problem, system, oracle: Oracle | None, routing, seconds: float) -> dict:
    if system == "cublas-bmm":
        return measure_cublas(p, seconds)
    figures = measure(p, system, seconds)
    if oracle:
        errors = oracle.errors(p, system, *routing)
        figures |= {"rel_err": max(errors.values()), "errors": errors}
    return figures


def bench_problem(p: Problem, systems: list, arguments: argparse.Namespace) -> list[dict]:
    rows = []
    routing = one_routing(p)
    oracle = Oracle(p, *routing) if not arguments.no_check else None
    for system in systems:
        name = system if isinstance(system, str) else system.name
        try:
            figures = figures_of(p, system, oracle, routing, arguments.seconds)
        except torch.cuda.OutOfMemoryError:
            print(f"{p.name:14}{name:26}out of memory", flush=True)
            figures = {"out_of_memory": True}
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{p.name:14}{name}: torch.compile failed, no figures: {reason}", flush=True)
            figures = {"compile_error": reason}
        head = {"shape": p.name, **p.sizes, "system": name}
        rows.append(head | {key: rounded(value) for key, value in figures.items()})
        if "fwd_ms" in figures:
            print(describe(p, rows[-1]), flush=True)
        torch.cuda.empty_cache()
    return rows


def describe(p: Problem, row: dict) -> str:
    def rates(prefix: str) -> str:
        if f"{prefix}fwd_ms" not in row:
            return ""
        forward, backward = row[f"{prefix}fwd_ms"], row[f"{prefix}bwd_ms"]
        label = prefix.rstrip("_") or "wall"
        return f"{label} {p.flops / forward / 1e9:.0f}/{2 * p.flops / backward / 1e9:.0f}  "

    text = f"{p.name:14}{row['system']:26}" + rates("") + rates("busy_") + rates("graph_")
    if "kept_mib" in row:
        text += f"kept {row['kept_mib']:.0f} peak {row['peak_fwd_mib']:.0f}/"
        text += f"{row['peak_bwd_mib']:.0f} MiB  first {row['first_call_s']:.2f} s"
    if "rel_err" in row:
        text += f"  error {row['rel_err']:.2e}"
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", help="suites of bench/problems.json (paper)")
    parser.add_argument("--problem", action="append", help="only problems of this name")
    parser.add_argument(
        "--system",
        action="append",
        choices=SYSTEMS,
        help=f"default: {', '.join(DEFAULT_SYSTEMS)}",
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="per timed figure")
    parser.add_argument("--kernels", action="store_true", help="print sonicmoe's kernels instead")
    parser.add_argument("--no-check", action="store_true", help="skip the float64 samples")
    parser.add_argument("--output", type=Path, help="write the JSON record here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    require_gpu()
    entries = suite_entries(arguments.suite or ["paper"], arguments.problem)
    systems = [SYSTEMS[name]() for name in arguments.system or DEFAULT_SYSTEMS]
    begin = time.perf_counter()
    import sonicmoe_cpp  # noqa: F401  (timed)

    record = new_record(import_s=rounded(time.perf_counter() - begin))
    print(f"{record['device']}, torch {torch.__version__}; model TFLOP/s forward/backward")
    for entry in entries:
        problem = Problem(entry["name"], tuple(entry["shape"]))
        if arguments.kernels:
            layer = SonicMoE().layer
            print_kernels(f"{problem.name} forward", lambda p=problem: layer(p))
            print_kernels(
                f"{problem.name} forward and backward",
                lambda p=problem: torch.autograd.grad(layer(p), p.leaves, p.grad),
            )
            continue
        record["rows"] += bench_problem(problem, systems, arguments)
        write_record(record, arguments.output)
        del problem
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
