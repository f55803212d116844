"""Fake implementations and autograd of the whole layer (csrc/moe_layer_ops.cpp)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import no_double_backward, register_autograd, register_in_place
from ._library import (
    FORM_PAIRS,
    FORM_TOP_K,
    gate_factor,
    metadata_bytes,
    ops,
    register_fake,
    rounded_capacity,
    run,
)
from ._moe import grad_like


class LayerOutput(NamedTuple):
    """Results of moe_layer_forward; only y and logits carry gradients."""

    y: Tensor  # [T, d]
    logits: Tensor  # [T, E] float32
    rows_per_expert: Tensor  # [E] int32: rows computed, after any rounding
    topk_ids: Tensor  # [T, K] int32: token choice, before any rounding
    token_ids: Tensor  # [P] int32, token rounding only
    expert_ids: Tensor  # [P] int32, token rounding only
    pair_weights: Tensor  # [T, K] or [P] float32
    h: Tensor  # [P, g*n]
    metadata: Tensor  # uint8

    @property
    def rows_per_expert_before(self) -> Tensor:
        """[E] int32 of token choice: what the balancing loss and the bias update take."""
        rounded = self.pair_weights.dim() == 1
        if not rounded:
            return self.rows_per_expert
        return count_rows(self.topk_ids, self.logits.shape[1])


def count_rows(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[E] int32: how often each expert stands in topk_ids."""
    # Unlike bincount, histc never waits for the GPU; on the CPU it takes floats only.
    ids = topk_ids.float() if topk_ids.device.type == "cpu" else topk_ids
    return torch.histc(ids, num_experts, 0, num_experts - 1).int()


@register_fake("moe_layer_forward")
def _(
    x, router_weight, router_bias, w1, b1, w2, b2, selection_bias, seed_tensor, activation,
    gate_up_layout, limit, deterministic, top_k, scoring, renormalize, num_groups, top_groups,
    scale, rounding, tile, policy, workspace_limit, seed, save_for_backward,
):  # fmt: skip
    num_tokens, hidden_size = x.shape
    num_experts = w1.shape[0]
    form = FORM_PAIRS if rounding else FORM_TOP_K
    pairs = num_tokens * top_k
    if rounding:
        pairs = rounded_capacity(num_tokens, num_experts, top_k, tile, policy)
    listed = (pairs,) if rounding else (0,)
    columns = gate_factor(activation) * w2.shape[2]
    size = metadata_bytes(form, num_tokens, pairs, num_experts)

    def empty(shape, dtype=x.dtype):
        return x.new_empty(shape, dtype=dtype)

    return (
        empty((num_tokens, hidden_size)),
        empty((num_tokens, num_experts), torch.float32),
        empty((num_experts,), torch.int32),
        empty((num_tokens, top_k), torch.int32),
        empty(listed, torch.int32),
        empty(listed, torch.int32),
        empty(listed if rounding else (num_tokens, top_k), torch.float32),
        empty((pairs, columns) if save_for_backward else (0,)),
        empty((size,) if save_for_backward else (0,), torch.uint8),
    )


@register_fake("moe_layer_backward")
def _(
    grad_out, grad_logits, x, router_weight, router_bias, w1, b1, w2, b2, selection_bias, logits,
    topk_ids, token_ids, expert_ids, pair_weights, h, metadata, activation, gate_up_layout, limit,
    deterministic, top_k, scoring, renormalize, num_groups, top_groups, scale, rounding, tile,
    policy, workspace_limit, need_x, need_router_weight, need_router_bias, need_w1, need_b1,
    need_w2, need_b2,
):  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else (0,)),
        grad_like(need_router_weight, "router_weight", router_weight, router_weight),
        grad_like(need_router_bias, "router_bias", router_bias, x),
        grad_like(need_w1, "w1", w1, x),
        grad_like(need_b1, "b1", b1, x),
        grad_like(need_w2, "w2", w2, x),
        grad_like(need_b2, "b2", b2, x),
    )


@register_fake("moe_layer_backward_accumulate")
def _(grad_out, grad_logits, x, *rest):
    need_x = rest[28]
    return x.new_empty(x.shape if need_x else (0,))


def save_for_backward(ctx, inputs, output):
    """Keeps what backward needs; `inputs` are the operator's arguments, `output` its results."""
    parameters, options, save = inputs[:7], inputs[9:23], inputs[24]
    if not save:
        raise RuntimeError("moe_layer_forward: a gradient is needed but save_for_backward is off")
    _, logits, rows, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows, *saved)
    ctx.save_for_backward(*parameters, logits, *saved)  # no bias: it has selected and may change
    ctx.options = options


def backward_arguments(ctx, grad_out: Tensor | None, grad_logits: Tensor | None) -> tuple:
    """What both backward operators begin with. Incoming gradients are dense; that of y is zero where
    only the logits were used."""
    saved = ctx.saved_tensors  # once: checkpointing recomputes on the first access only
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out.contiguous()
    grad_logits = None if grad_logits is None else grad_logits.contiguous()
    selection_bias = None
    return grad_out, grad_logits, *saved[:7], selection_bias, *saved[7:], *ctx.options


def _backward(ctx, grad_out, grad_logits, *unused):
    none = (None,) * 25
    if grad_out is None and grad_logits is None:
        return none
    needs = ctx.needs_input_grad[:7]
    arguments = backward_arguments(ctx, grad_out, grad_logits)
    grads = run(ops.moe_layer_backward, *arguments, *needs)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), *none[7:]


register_autograd("moe_layer_forward", _backward, save_for_backward)
register_autograd("moe_layer_backward", no_double_backward)
register_in_place("moe_layer_backward_accumulate")
