"""Fake implementations and autograd of the experts' operators (csrc/moe_ops.cpp)."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ._autograd import called_by_nodes, register_autograd, register_once_differentiable
from ._checks import refuse
from ._library import (
    FORM_SORTED,
    FORM_TOP_K,
    gate_factor,
    in_steps,
    lists_tokens,
    metadata_bytes,
    register_fake,
    row_capacity,
    row_lists_bytes,
    run,
)
from .options import ExpertOptions, RoutedExpertOptions


@register_fake("moe_forward")
def _(x, w1, b1, w2, b2, form, ids, token_ids, weights, options, reals, save_for_backward):
    num_tokens = math.prod(x.shape[:-1])
    num_pairs = num_tokens if form == FORM_SORTED else ids.numel()
    y = x.new_empty(x.shape)
    experts = RoutedExpertOptions.unpack(iter(options), iter(reals))
    rows_dropped = dropped_like(x, experts)
    if not save_for_backward:
        return y, x.new_empty((0,)), x.new_empty((0,), dtype=torch.uint8), rows_dropped
    rows = row_capacity(num_pairs, experts.max_rows)
    h = x.new_empty((rows, gate_factor(experts.activation) * w2.shape[2]))
    size = metadata_bytes(form, num_tokens, num_pairs, rows, w1.shape[0])
    return y, h, x.new_empty((size,), dtype=torch.uint8), rows_dropped


def dropped_like(x: Tensor, experts: ExpertOptions) -> Tensor:
    """rows_dropped of a forward."""
    return x.new_empty((0 if experts.max_rows is None else 1,), dtype=torch.int32)


def new_gradient(operation: str, like: Tensor, name: str, need: bool, of: Tensor | None) -> Tensor:
    """What a backward operator returns for `of`: its layout is kept, unneeded is empty."""
    if not need:
        return like.new_empty((0,))
    if of is None:
        refuse(operation, "needs", f"False for {name}, as the tensor is absent", "True")
    grad = torch.empty_like(of)
    # Of elements that overlap torch keeps an order of dimensions that no gradient may have.
    strides = grad.stride()[-2:] if of.dim() == 3 else grad.stride()[-1:]
    return grad if 1 in strides else of.new_empty(of.shape)


@register_fake("moe_backward")
def _(
    grad_out, x, w1, b1, w2, b2, form, ids, token_ids, weights, saved, options, reals, needs
):  # fmt: skip
    need_x, need_w1, need_b1, need_w2, need_b2, need_weights = needs
    grad_like = functools.partial(new_gradient, "moe_backward", x)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        grad_like("grad_w1", need_w1, w1),
        grad_like("grad_b1", need_b1, b1),
        grad_like("grad_w2", need_w2, w2),
        grad_like("grad_b2", need_b2, b2),
        grad_like("grad_weights", need_weights, weights).float(),
    )


@register_fake("moe_backward_hidden")
def _(
    grad_out, x, w1, b1, w2, b2, form, ids, token_ids, weights, saved, options, reals, need_weights
):  # fmt: skip
    grad_weights = new_gradient("moe_backward_hidden", x, "grad_weights", need_weights, weights)
    experts = RoutedExpertOptions.unpack(iter(options), iter(reals))
    top_k = ids.shape[-1] if form == FORM_TOP_K else None
    return *handed_on(x, w1, w2, saved[0], top_k, experts), grad_weights.float()


def handed_on(
    x: Tensor, w1: Tensor, w2: Tensor, h: Tensor, top_k: int | None, experts: ExpertOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_h, scaled_a and row_lists of a backward in steps. top_k: None of other forms."""
    rows, num_tokens = h.shape[0], math.prod(x.shape[:-1])
    bounded = experts.deterministic and experts.max_rows is not None
    listed = num_tokens if bounded and lists_tokens(rows, num_tokens, top_k) else 0
    lists = row_lists_bytes(x.device, rows, w1.shape[0], listed)
    return (
        torch.empty_like(h),
        x.new_empty((rows, w2.shape[2])),
        x.new_empty((lists,), dtype=torch.uint8),
    )


@register_fake("moe_backward_down")
def _(
    grad_out, x, w1, b1, w2, b2, form, ids, token_ids, weights, saved, options, reals, needs
):  # fmt: skip
    need_w2, need_b2 = needs
    return (
        new_gradient("moe_backward_down", x, "grad_w2", need_w2, w2),
        new_gradient("moe_backward_down", x, "grad_b2", need_b2, b2),
    )


@register_fake("moe_backward_up")
def _(x, w1, b1, w2, b2, form, ids, token_ids, weights, saved, options, reals, needs):
    need_x, need_w1, need_b1 = needs
    return (
        x.new_empty(x.shape if need_x else (0,)),
        new_gradient("moe_backward_up", x, "grad_w1", need_w1, w1),
        new_gradient("moe_backward_up", x, "grad_b1", need_b1, b1),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w1, b1, w2, b2, form, ids, token_ids, weights, options, reals, save_for_backward = inputs
    if not save_for_backward:
        raise RuntimeError("moe_forward: a gradient is needed but save_for_backward is off")
    _, h, metadata, rows_dropped = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h, metadata, rows_dropped)
    ctx.save_for_backward(x, w1, b1, w2, b2, ids, token_ids, weights, h, metadata)
    ctx.form = form
    ctx.options = options, reals


_whole, _hidden, _down, _up = (
    called_by_nodes(f"moe_backward{step}") for step in ("", "_hidden", "_down", "_up")
)


def _backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> tuple:
    needs = ctx.needs_input_grad
    if grad_out is None:
        return (None,) * len(needs)
    x, w1, b1, w2, b2, ids, token_ids, weights, h, metadata = ctx.saved_tensors
    need_x, need_w1, need_b1, need_w2, need_b2, _, _, _, need_weights, *others = needs
    grad_out = grad_out.contiguous()
    inputs = x, w1, b1, w2, b2, ctx.form, ids, token_ids, weights
    if in_steps(h):
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept
        grad_h, scaled_a, row_lists, grad_weights = run(
            _hidden, grad_out, *inputs, [h, metadata], *ctx.options, need_weights
        )
        del h  # its last name
        grad_w2, grad_b2 = run(
            _down,
            grad_out, *inputs, [metadata, scaled_a, row_lists], *ctx.options, (need_w2, need_b2),
        )  # fmt: skip
        del scaled_a
        grad_x, grad_w1, grad_b1 = run(
            _up,
            *inputs, [metadata, grad_h, row_lists], *ctx.options, (need_x, need_w1, need_b1),
        )  # fmt: skip
    else:
        grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_weights = run(
            _whole,
            grad_out, *inputs, [h, metadata], *ctx.options,
            (need_x, need_w1, need_b1, need_w2, need_b2, need_weights),
        )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_w1 if need_w1 else None,
        grad_b1 if need_b1 else None,
        grad_w2 if need_w2 else None,
        grad_b2 if need_b2 else None,
        None,
        None,
        None,
        grad_weights.to(weights.dtype) if need_weights else None,
        *(None for _ in others),
    )


register_autograd("moe_forward", _backward, _setup_context)
for name in ("moe_backward", "moe_backward_hidden", "moe_backward_down", "moe_backward_up"):
    register_once_differentiable(name)
