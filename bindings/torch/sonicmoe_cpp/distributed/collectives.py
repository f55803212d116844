"""The collectives of an exchange, through torch.distributed: traceable, on NCCL and gloo."""

from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor

# Before torch 2.13 it has another name, which warns from then on.
_GATHER = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """[T, ...] of each rank as [size T, ...], by rank. No gradient."""
    return functional.wait_tensor(_GATHER(tensor.contiguous(), 0, group))


def sum_parts(parts: Tensor, group: Any, size: int) -> Tensor:
    """[size T, ...], a part of every rank's tokens -> [T, ...], the sum of all parts of the own: in
    float32, rounded once to the dtype of the parts, the same bits run after run. No gradient.

    An all-to-all of equal pieces, not a reduce-scatter, which NCCL's ring would round at every hop.
    """
    received = functional.all_to_all_single(parts.contiguous(), None, None, group)
    received = functional.wait_tensor(received)
    return received.unflatten(0, (size, -1)).sum(0, dtype=torch.float32).to(parts.dtype)


def sum_everywhere(parts: Tensor, group: Any, size: int) -> Tensor:
    """[T, ...], parts of the same tokens on every rank -> the sum of the parts, on every rank, with
    the bits of sum_parts. No gradient."""
    tokens = parts.shape[0]
    pieces = padded(parts, -(-tokens // size) * size)
    return first(all_gather(sum_parts(pieces, group, size), group), tokens)


def padded(tensor: Tensor, rows: int, value: int = 0) -> Tensor:
    """[rows, ...], those beyond tensor's own filled with value."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])


def first(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of tensor, and no view: FSDP2 loses its hooks on those."""
    return tensor if tensor.shape[0] == rows else tensor[:rows].clone()


def most(count: int, device: torch.device, group: Any) -> int:
    """The largest count of the ranks. Waits for the GPU."""
    counts = all_gather(torch.tensor([count], device=device), group)
    return int(counts.max())


class Gather(torch.autograd.Function):
    """all_gather; the gradient is the sum of the parts that the ranks have of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return sum_parts(grad, ctx.group, ctx.size), None, None


class SumParts(torch.autograd.Function):
    """sum_parts; every rank needs the gradients of all tokens."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any, size: int) -> Tensor:
        ctx.group = group
        return sum_parts(parts, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return all_gather(grad, ctx.group), None, None


class Shared(torch.autograd.Function):
    """A tensor that every rank has already; its gradient is the sum of the parts that the ranks
    have of it, on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return sum_everywhere(grad, ctx.group, ctx.size), None, None


class SumShared(torch.autograd.Function):
    """sum_everywhere; every rank has the gradient of the sum already."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any, size: int) -> Tensor:
        return sum_everywhere(parts, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None, None


class GatherRouting(torch.autograd.Function):
    """all_gather of integers [T, K] (one or more such tensors) and of weights [T, K] in one
    collective. Of the weights float32 travels, and their gradient is summed as Gather's is: exact,
    since every slot has one owner and the others' parts are zero."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, group: Any, size: int, *integers: Tensor) -> tuple:
        ctx.group, ctx.size, ctx.dtype = group, size, weights.dtype
        bits = weights.float().view(torch.int32)
        # What int32 does not hold names nothing, and must not become what its low half names.
        narrow = (i.clamp(-1, 2**31 - 1).to(torch.int32) for i in integers)
        packed = torch.stack([*narrow, bits])
        parts = all_gather(packed[None], group).unbind(1)  # each [size, T, K]
        *gathered, bits = (part.flatten(0, 1) for part in parts)
        ctx.mark_non_differentiable(*gathered)
        return bits.view(torch.float32), *gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple:
        total = sum_parts(grad, ctx.group, ctx.size).to(ctx.dtype)
        return total, None, None, *(None for _ in unused)
