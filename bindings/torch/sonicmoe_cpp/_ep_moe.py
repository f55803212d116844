"""Fake implementations and autograd of the exchange's operators (csrc/exchange_ops.cpp)."""

from typing import Any

import torch
from torch import Tensor

from ._autograd import called_by_nodes, register_autograd, register_once_differentiable
from ._library import (
    FORM_TOP_K,
    gate_factor,
    metadata_bytes,
    register_fake,
    row_capacity,
    run,
)
from ._moe import dropped_like, new_gradient
from .options import RoutedExpertOptions

NUM_PLACES: dict[int, int] = {}  # of every open exchange: tokens of all ranks, at most


@register_fake("ep_moe_forward")
def _(
    x, exchange, ids, weights, w1, b1, w2, b2, options, reals, save_for_backward, keep_received
):  # fmt: skip
    places = NUM_PLACES[exchange]
    experts = RoutedExpertOptions.unpack(iter(options), iter(reals))
    y, dropped = x.new_empty(x.shape), dropped_like(x, experts)
    received = x.new_empty((places, x.shape[1]) if keep_received else (0,))
    if not save_for_backward:
        return y, x.new_empty((0,)), x.new_empty((0,), dtype=torch.uint8), received, dropped
    pairs = places * ids.shape[1]
    rows = row_capacity(pairs, experts.max_rows)
    h = x.new_empty((rows, gate_factor(experts.activation) * w2.shape[2]))
    size = metadata_bytes(FORM_TOP_K, places, pairs, rows, w1.shape[0])
    return y, h, x.new_empty((size,), dtype=torch.uint8), received, dropped


@register_fake("ep_moe_backward")
def _(
    grad_out, x, exchange, ids, weights, w1, b1, w2, b2, saved, options, reals, needs
):  # fmt: skip
    operation, (need_w1, need_b1, need_w2, need_b2) = "ep_moe_backward", needs
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape, dtype=torch.float32),
        new_gradient(operation, x, "grad_w1", need_w1, w1),
        new_gradient(operation, x, "grad_b1", need_b1, b1),
        new_gradient(operation, x, "grad_w2", need_w2, w2),
        new_gradient(operation, x, "grad_b2", need_b2, b2),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, exchange, ids, weights, w1, b1, w2, b2, options, reals, save, _ = inputs
    if not save:
        raise RuntimeError("ep_moe_forward: a gradient is needed but save_for_backward is off")
    _, h, metadata, received, rows_dropped = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h, metadata, received, rows_dropped)
    ctx.save_for_backward(x, ids, weights, w1, b1, w2, b2, h, metadata, received)
    ctx.exchange, ctx.options = exchange, (options, reals)


_operator = called_by_nodes("ep_moe_backward")


def _backward(ctx: Any, grad_out: Tensor | None, *unused: None) -> tuple:
    needs = ctx.needs_input_grad
    x, ids, weights, w1, b1, w2, b2, *saved = ctx.saved_tensors
    if grad_out is None:  # all ranks take part, those without a gradient too
        grad_out = torch.zeros_like(x)
    need_x, _, _, need_weights, need_w1, need_b1, need_w2, need_b2, *others = needs
    grad_x, grad_weights, grad_w1, grad_b1, grad_w2, grad_b2 = run(
        _operator,
        grad_out.contiguous(), x, ctx.exchange, ids, weights, w1, b1, w2, b2, saved, *ctx.options,
        (need_w1, need_b1, need_w2, need_b2),
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        None,
        None,
        grad_weights.to(weights.dtype) if need_weights else None,
        grad_w1 if need_w1 else None,
        grad_b1 if need_b1 else None,
        grad_w2 if need_w2 else None,
        grad_b2 if need_b2 else None,
        *(None for _ in others),
    )


register_autograd("ep_moe_forward", _backward, _setup_context)
register_once_differentiable("ep_moe_backward")
