"""Fake implementations and autograd of the experts' operators (csrc/moe_ops.cpp)."""

import torch
from torch import Tensor

from ._library import (
    FORM_SORTED,
    gate_factor,
    metadata_bytes,
    no_double_backward,
    ops,
    run,
)


@torch.library.register_fake("sonicmoe_cpp::moe_forward")
def _(
    x, w1, b1, w2, b2, form, ids, token_ids, weights, activation, gate_up_layout, limit,
    deterministic, workspace_limit, save_for_backward,
):  # fmt: skip
    num_tokens, hidden_size = x.shape
    num_pairs = num_tokens if form == FORM_SORTED else ids.numel()
    y = x.new_empty((num_tokens, hidden_size))
    if not save_for_backward:
        return y, x.new_empty((0,)), x.new_empty((0,), dtype=torch.uint8)
    h = x.new_empty((num_pairs, gate_factor(activation) * w2.shape[2]))
    size = metadata_bytes(form, num_tokens, num_pairs, w1.shape[0])
    return y, h, x.new_empty((size,), dtype=torch.uint8)


def grad_like(needed: bool, tensor: Tensor | None, like: Tensor) -> Tensor:
    """What a backward operator returns for one weight: its layout is kept, unneeded is empty."""
    if not needed or tensor is None:
        return like.new_empty((0,))
    return torch.empty_like(tensor)


@torch.library.register_fake("sonicmoe_cpp::moe_backward")
def _(
    grad_out, x, w1, b1, w2, b2, form, ids, token_ids, weights, h, metadata, activation,
    gate_up_layout, limit, deterministic, workspace_limit, need_x, need_w1, need_b1, need_w2,
    need_b2, need_weights,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        grad_like(need_w1, w1, x),
        b1.new_empty(b1.shape) if need_b1 else x.new_empty((0,)),
        grad_like(need_w2, w2, x),
        b2.new_empty(b2.shape) if need_b2 else x.new_empty((0,)),
        x.new_empty(weights.shape if need_weights else (0,), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, form, ids, token_ids, weights, *options, save_for_backward = inputs
    if not save_for_backward:
        raise RuntimeError("moe_forward: a gradient is needed but save_for_backward is off")
    _, h, metadata = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h, metadata)
    ctx.save_for_backward(x, w1, b1, w2, b2, ids, token_ids, weights, h, metadata)
    ctx.form = form
    ctx.options = options


def _backward(ctx, grad_out, grad_h, grad_metadata):
    none = (None,) * 15
    if grad_out is None:
        return none
    x, w1, b1, w2, b2, ids, token_ids, weights, h, metadata = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = (need[0], need[1], need[2], need[3], need[4], need[8])
    grads = run(
        ops.moe_backward,
        grad_out.contiguous(), x, w1, b1, w2, b2, ctx.form, ids, token_ids, weights, h, metadata,
        *ctx.options, *needs,
    )  # fmt: skip
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_weights = (
        grad if needed else None for grad, needed in zip(grads, needs, strict=True)
    )
    if grad_weights is not None:
        grad_weights = grad_weights.to(weights.dtype)
    return (
        grad_x, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, grad_weights, *none[9:],
    )  # fmt: skip


torch.library.register_autograd(
    "sonicmoe_cpp::moe_forward", _backward, setup_context=_setup_context
)
torch.library.register_autograd("sonicmoe_cpp::moe_backward", no_double_backward)
