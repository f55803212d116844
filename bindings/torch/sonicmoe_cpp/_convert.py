"""From checked arguments to what the operators take: matrices of rows, in float32 or bfloat16."""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_dtype, names_of, refuse
from ._rules import SEED


def autocast(operation: str, x: Tensor, *parameters: Tensor | None) -> Any:
    """Under autocast: x and the experts' parameters in the autocast dtype, as for linear."""
    tensors = [x, *parameters]
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16):
            refuse(operation, "x", "float32 or bfloat16", f"{names_of((dtype,))} of autocast")
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    check_dtype(operation, "x", tensors[0], torch.float32, torch.bfloat16)
    return tensors


def rows_of(operation: str, argument: str, x: Tensor) -> Tensor:
    """[..., d] with unit stride in d and leading dimensions that are one in memory; x itself
    wherever it is so."""
    if x.shape[-1] == 0:
        refuse(operation, argument, "a last dimension of at least 1", f"shape {list(x.shape)}")
    if x.is_contiguous() or (x.dim() == 2 and x.stride(-1) == 1):
        return x
    strides, shape = x.stride(), x.shape
    dense = all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(x.dim() - 2))
    return x if dense and strides[-1] == 1 else x.contiguous()


def matrix(operation: str, argument: str, x: Tensor) -> Tensor:
    """[..., d] as [rows, d] with unit stride in d; a view wherever there is one."""
    return flat(rows_of(operation, argument, x))


def flat(tensor: Tensor) -> Tensor:
    """[..., d] as [rows, d]."""
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.unsqueeze(0)


def float_logits(operation: str, logits: Tensor) -> Tensor:
    """[..., E] as float32 [T, E], contiguous."""
    return matrix(operation, "logits", logits).float().contiguous()


def seed_of(operation: str, seed: int | Tensor) -> tuple[int, Tensor | None]:
    """An int stays in the call; a tensor (int64, one element) is read when the operator runs."""
    if not isinstance(seed, Tensor):
        return SEED.check(operation, "seed", seed), None
    if seed.numel() != 1:
        refuse(operation, "seed", "one element", f"shape {list(seed.shape)}")
    return 0, seed.reshape(1)


def constant(bias: Tensor | None) -> Tensor | None:
    """A selection bias has no gradient, even where it is a Parameter."""
    return bias.detach() if bias is not None and bias.requires_grad else bias


def needs_backward(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    # A batch of vmap does not tell whether what it wraps requires a gradient.
    return torch._C._are_functorch_transforms_active()
