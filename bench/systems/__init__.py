"""The systems that bench/layer.py times, and the dense products of cuBLAS."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.lib.timing import BF16, Problem


class SonicMoE:
    """This library; options are keywords of moe and moe_layer."""

    profiled = True  # busy time too

    def __init__(self, name: str, replayed: bool = False, **options) -> None:
        """replayed: as a CUDA graph too."""
        self.name, self.replayed, self.options = name, replayed, options

    @property
    def lacking(self) -> str | None:
        """Why the installed package cannot be this system."""
        import sonicmoe_cpp

        known = inspect.signature(sonicmoe_cpp.moe).parameters
        unknown = [key for key in self.options if key not in known]
        return f"sonicmoe_cpp does not know {', '.join(unknown)}" if unknown else None

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe(p.x, p.w1, p.w2, ids, weights, **self.options)

    def layer(self, p: Problem) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe_layer(
            p.x, p.router, p.w1, p.w2, p.shape[4], scoring="topk_softmax", **self.options
        )[0]


class OfficialSonicMoE:
    """The official CuTe-DSL layer, where its package sonic-moe is installed. It takes gate and up in
    alternating rows of w1, so it computes another function of the same random weights: its errors are
    not measured. Its first call at a shape compiles and tunes (QUACK_CACHE_DIR keeps what it finds)."""

    name = "sonic-moe"
    profiled = replayed = True

    @property
    def lacking(self) -> str | None:
        found = importlib.util.find_spec("sonicmoe")
        return None if found else "the package sonic-moe is not installed"

    def layer(self, p: Problem) -> torch.Tensor:
        from sonicmoe import moe_TC_softmax_topk_layer

        w1, w2 = (w.permute(1, 2, 0) for w in (p.w1, p.w2))
        stream = torch.cuda.current_stream().cuda_stream
        top_k = p.shape[4]
        return moe_TC_softmax_topk_layer(p.x, p.router, w1, None, w2, None, top_k, stream)[0]


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
    profiled = replayed = False

    def __init__(self) -> None:
        self.pointwise = tuple(torch.compile(f, dynamic=True) for f in (swiglu, weighted_sum))

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        return grouped_experts(p.x, p.w1, p.w2, ids, weights, *self.pointwise)

    def layer(self, p: Problem) -> torch.Tensor:
        return grouped_layer(p.x, p.router, p.w1, p.w2, p.shape[4], *self.pointwise)


class CompiledGroupedMM:
    """The same layer under torch.compile as a whole, anew for every shape. The experts alone would
    be another compilation: the errors of this system are not measured."""

    name = "torch-grouped_mm-compiled"
    profiled = replayed = False

    def __init__(self) -> None:
        torch._dynamo.config.recompile_limit = 64  # past it torch would silently run eagerly
        self._layer = torch.compile(grouped_layer, dynamic=False)

    def layer(self, p: Problem) -> torch.Tensor:
        return self._layer(p.x, p.router, p.w1, p.w2, p.shape[4])


class Products:
    """The six products alone, batched and balanced: rows = T*K/E per expert."""

    def __init__(self, p: Problem) -> None:
        tokens, d, n, experts, top_k = p.shape
        rows = max(1, tokens * top_k // experts)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=p.x.device, dtype=BF16)

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


class Cublas:
    name = "cublas-bmm"
    products = Products


SYSTEMS: dict[str, Callable] = {
    "sonicmoe": lambda: SonicMoE("sonicmoe", replayed=True),
    "sonicmoe-atomic": lambda: SonicMoE("sonicmoe-atomic", deterministic=False),
    OfficialSonicMoE.name: OfficialSonicMoE,
    GroupedMM.name: GroupedMM,
    CompiledGroupedMM.name: CompiledGroupedMM,
    Cublas.name: Cublas,
}


def systems_named(names: list[str] | None) -> list:
    """Those systems, else all of them; what the installed package lacks is left out with a note."""
    systems = []
    for name in names or SYSTEMS:
        system = SYSTEMS[name]()
        if lacking := getattr(system, "lacking", None):
            print(f"{name}: skipped, {lacking}", flush=True)
            continue
        systems.append(system)
    return systems
