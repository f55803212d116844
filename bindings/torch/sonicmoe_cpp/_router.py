"""Fake implementations and autograd of the router's operators (csrc/router_ops.cpp)."""

import torch

from ._autograd import no_double_backward, register_autograd, register_in_place
from ._library import ops, register_fake, rounded_capacity, run

# ------------------------------------------------------------------------------------------- route


@register_fake("route_forward")
def _(logits, selection_bias, top_k, scoring, renormalize, num_groups, top_groups, scale):
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )


@register_fake("route_backward")
def _(grad_topk_weights, logits, topk_ids, *options):
    return logits.new_empty(logits.shape)


def _route_setup_context(ctx, inputs, output):
    logits, _, *options = inputs
    topk_ids, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(topk_ids)
    ctx.save_for_backward(logits, topk_ids)  # the bias has selected and may change
    ctx.options = options


def _route_backward(ctx, grad_ids, grad_weights):
    none = (None,) * 7
    if grad_weights is None:
        return None, *none
    grad = grad_weights.contiguous()
    return run(ops.route_backward, grad, *ctx.saved_tensors, None, *ctx.options), *none


register_autograd("route_forward", _route_backward, _route_setup_context)
register_autograd("route_backward", no_double_backward)

# ------------------------------------------------------------------------------------ round_tokens


@register_fake("round_tokens_forward")
def _(
    logits, selection_bias, seed_tensor, top_k, scoring, renormalize, num_groups, top_groups,
    scale, tile, policy, seed,
):  # fmt: skip
    num_tokens, num_experts = logits.shape
    capacity = rounded_capacity(num_tokens, num_experts, top_k, tile, policy)
    return (
        logits.new_empty((capacity,), dtype=torch.int32),
        logits.new_empty((capacity,), dtype=torch.int32),
        logits.new_empty((capacity,), dtype=torch.float32),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
    )


@register_fake("round_tokens_backward")
def _(grad_pair_weights, logits, *rest):
    return logits.new_empty(logits.shape)


def _round_tokens_setup_context(ctx, inputs, output):
    logits, _, _, *options = inputs
    token_ids, expert_ids, _, topk_ids, rows, rows_before = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(token_ids, expert_ids, topk_ids, rows, rows_before)
    ctx.save_for_backward(logits, topk_ids, token_ids, expert_ids)
    ctx.options = options[:6]


def _round_tokens_backward(ctx, grad_tokens, grad_experts, grad_weights, *unused):
    none = (None,) * 11
    if grad_weights is None:
        return None, *none
    grad = grad_weights.contiguous()
    return run(ops.round_tokens_backward, grad, *ctx.saved_tensors, None, *ctx.options), *none


register_autograd("round_tokens_forward", _round_tokens_backward, _round_tokens_setup_context)
register_autograd("round_tokens_backward", no_double_backward)

# ------------------------------------------------------------------------------------------ losses


@register_fake("load_balancing_loss_forward")
def _(logits, rows_per_expert, top_k, scoring):
    return logits.new_empty((1,))


@register_fake("load_balancing_loss_backward")
def _(grad_loss, logits, rows_per_expert, top_k, scoring):
    return logits.new_empty(logits.shape)


def _balancing_setup_context(ctx, inputs, output):
    logits, rows_per_expert, *options = inputs
    ctx.save_for_backward(logits, rows_per_expert)
    ctx.options = options


def _balancing_backward(ctx, grad_loss):
    grad = run(
        ops.load_balancing_loss_backward,
        grad_loss.contiguous(),
        *ctx.saved_tensors,
        *ctx.options,
    )
    return grad, None, None, None


register_autograd("load_balancing_loss_forward", _balancing_backward, _balancing_setup_context)
register_autograd("load_balancing_loss_backward", no_double_backward)


@register_fake("router_z_loss_forward")
def _(logits):
    return logits.new_empty((1,))


@register_fake("router_z_loss_backward")
def _(grad_loss, logits):
    return logits.new_empty(logits.shape)


def _z_loss_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _z_loss_backward(ctx, grad_loss):
    return run(ops.router_z_loss_backward, grad_loss.contiguous(), *ctx.saved_tensors)


register_autograd("router_z_loss_forward", _z_loss_backward, _z_loss_setup_context)
register_autograd("router_z_loss_backward", no_double_backward)


@register_fake("update_expert_bias_")
def _(bias, rows_per_expert, rate):
    return None


register_in_place("update_expert_bias_")
