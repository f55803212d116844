"""torch's grouped_mm: the one baseline, as transformers' experts compute on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.lib.problem import Problem


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
