"""Fake implementations and autograd of the experts' operators (csrc/moe_ops.cpp)."""

import torch
from torch import Tensor

from ._autograd import no_double_backward, register_autograd
from ._checks import refuse
from ._library import FORM_SORTED, gate_factor, metadata_bytes, ops, register_fake, run


@register_fake("moe_forward")
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


def grad_like(needed: bool, name: str, of: Tensor | None, like: Tensor) -> Tensor:
    """What a backward operator returns for `of`: its layout is kept, unneeded is empty."""
    if not needed:
        return like.new_empty((0,))
    if of is None:
        refuse("sonicmoe_cpp", f"need_{name}", f"False, since {name} is absent", "True")
    grad = torch.empty_like(of)
    # Of elements that overlap torch keeps an order of dimensions that no gradient may have.
    strides = grad.stride()[-2:] if of.dim() == 3 else grad.stride()[-1:]
    return grad if 1 in strides else of.new_empty(of.shape)


@register_fake("moe_backward")
def _(
    grad_out, x, w1, b1, w2, b2, form, ids, token_ids, weights, h, metadata, activation,
    gate_up_layout, limit, deterministic, workspace_limit, need_x, need_w1, need_b1, need_w2,
    need_b2, need_weights,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        grad_like(need_w1, "w1", w1, x),
        grad_like(need_b1, "b1", b1, x),
        grad_like(need_w2, "w2", w2, x),
        grad_like(need_b2, "b2", b2, x),
        grad_like(need_weights, "weights", weights, x).float(),
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


register_autograd("moe_forward", _backward, _setup_context)
register_autograd("moe_backward", no_double_backward)
