"""Clipping of gradients that lie on several meshes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .collectives import all_gather


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, where gradients may be DTensors of several meshes: experts
    sharded over other ranks than the rest, for one. Returns the norm of all gradients as one
    process computes it: a plain tensor, the same bits on every rank.

    max |g| for norm_type inf, else (sum |g|^norm_type)^(1/norm_type), over all elements of the
    whole gradients; each is multiplied by min(1, max_norm / (norm + 1e-6)). A plain gradient counts
    as the same on every rank. Collective: every rank calls it with the same parameters, and one
    number of each rank is gathered over every mesh that shards.
    Errors: ValueError for a norm_type that is not above 0.
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: norm_type: expected a number above 0, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    groups: dict[tuple[Any, tuple], list[Tensor]] = {}  # parameters by where their gradients lie
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            place = getattr(grad, "device_mesh", None), getattr(grad, "placements", ())
            groups.setdefault(place, []).append(parameter)
    norms = [_norm(group, mesh, at, norm_type) for (mesh, at), group in groups.items()]
    total = get_total_norm(norms, norm_type)
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _norm(parameters: list[Tensor], mesh: Any, placements: tuple, norm_type: float) -> Tensor:
    """Of gradients that lie in one place."""
    grads: list[Any] = [parameter.grad for parameter in parameters]
    if any(placement.is_partial() for placement in placements):
        return get_total_norm([grad.full_tensor() for grad in grads], norm_type)
    local = [grad if mesh is None else grad.to_local() for grad in grads]
    # The largest of no element is nothing to torch, and 0 here.
    some = [grad for grad in local if grad.numel() > 0] or [local[0].new_zeros(1)]
    norm = get_total_norm(some, norm_type)
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            norms = all_gather(norm.reshape(1), mesh.get_group(dim))
            norm = torch.linalg.vector_norm(norms, norm_type)
    return norm
