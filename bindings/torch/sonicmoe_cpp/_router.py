"""Fake implementations and autograd of the router's operators (csrc/router_ops.cpp)."""

import functools
from typing import Any

import torch
from torch import Tensor

from ._autograd import register_autograd, register_in_place, register_once_differentiable
from ._library import ops, register_fake, rounded_capacity, run
from ._moe import new_gradient
from .options import RoundingOptions, RouterOptions

# ------------------------------------------------------------------------------------------ logits


@register_fake("router_logits_forward")
def _(x, router_weight, router_bias):
    return x.new_empty((x.shape[0], router_weight.shape[0]), dtype=torch.float32)


@register_fake("router_logits_backward")
def _(grad_logits, x, router_weight, router_bias, needs):
    need_x, need_weight, need_bias = needs
    grad_like = functools.partial(new_gradient, "router_logits_backward", x)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        grad_like("grad_router_weight", need_weight, router_weight),
        grad_like("grad_router_bias", need_bias, router_bias),
    )


def _logits_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _logits_backward(ctx: Any, grad_logits: Tensor) -> tuple:
    needs = ctx.needs_input_grad
    grads = run(ops.router_logits_backward, grad_logits.contiguous(), *ctx.saved_tensors, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


register_autograd("router_logits_forward", _logits_backward, _logits_setup_context)
register_once_differentiable("router_logits_backward")

# ------------------------------------------------------------------------------------------- route


@register_fake("route_forward")
def _(logits, selection_bias, options, reals):
    router = RouterOptions.unpack(iter(options), iter(reals))
    shape = (logits.shape[0], router.top_k)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )


@register_fake("route_backward")
def _(grad_topk_weights, logits, topk_ids, options, reals):
    return logits.new_empty(logits.shape)


def _route_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, *ctx.options = inputs
    topk_ids, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(topk_ids)
    ctx.save_for_backward(logits, topk_ids)  # the bias has selected and may change


def _route_backward(ctx: Any, grad_ids: None, grad_weights: Tensor | None) -> tuple:
    grad = None
    if grad_weights is not None:
        grad = run(ops.route_backward, grad_weights.contiguous(), *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None


register_autograd("route_forward", _route_backward, _route_setup_context)
register_once_differentiable("route_backward")

# ------------------------------------------------------------------------------------ round_tokens


@register_fake("round_tokens_forward")
@register_fake("round_tokens_to_forward")
def _(logits, selection_bias, seed_or_targets, options, reals):
    integers, numbers = iter(options), iter(reals)
    router = RouterOptions.unpack(integers, numbers)
    rounding = RoundingOptions.unpack(integers, numbers)
    num_tokens, num_experts = logits.shape
    capacity = rounded_capacity(
        num_tokens, num_experts, router.top_k, rounding.tile, rounding.policy
    )
    return (
        logits.new_empty((capacity,), dtype=torch.int32),
        logits.new_empty((capacity,), dtype=torch.int32),
        logits.new_empty((capacity,), dtype=torch.float32),
        logits.new_empty((num_tokens, router.top_k), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
    )


@register_fake("round_tokens_backward")
def _(grad_pair_weights, logits, topk_ids, token_ids, expert_ids, options, reals):
    return logits.new_empty(logits.shape)


def _round_tokens_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, *ctx.options = inputs
    token_ids, expert_ids, _, topk_ids, rows, rows_before = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(token_ids, expert_ids, topk_ids, rows, rows_before)
    ctx.save_for_backward(logits, topk_ids, token_ids, expert_ids)


def _round_tokens_backward(
    ctx: Any, grad_tokens: None, grad_experts: None, grad_weights: Tensor | None, *unused: None
) -> tuple:
    grad = None
    if grad_weights is not None:
        grad = run(
            ops.round_tokens_backward, grad_weights.contiguous(), *ctx.saved_tensors, *ctx.options
        )
    return grad, None, None, None, None


for name in ("round_tokens_forward", "round_tokens_to_forward"):
    register_autograd(name, _round_tokens_backward, _round_tokens_setup_context)
register_once_differentiable("round_tokens_backward")

# ------------------------------------------------------------------------------------------ losses


@register_fake("load_balancing_loss_forward")
def _(logits, rows_per_expert, top_k, scoring):
    return logits.new_empty((1,))


@register_fake("load_balancing_loss_backward")
def _(grad_loss, logits, rows_per_expert, top_k, scoring):
    return logits.new_empty(logits.shape)


def _balancing_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, rows_per_expert, *options = inputs
    ctx.save_for_backward(logits, rows_per_expert)
    ctx.options = options


def _balancing_backward(ctx: Any, grad_loss: Tensor) -> tuple:
    grad = run(
        ops.load_balancing_loss_backward,
        grad_loss.contiguous(),
        *ctx.saved_tensors,
        *ctx.options,
    )
    return grad, None, None, None


register_autograd("load_balancing_loss_forward", _balancing_backward, _balancing_setup_context)
register_once_differentiable("load_balancing_loss_backward")


@register_fake("router_z_loss_forward")
def _(logits):
    return logits.new_empty((1,))


@register_fake("router_z_loss_backward")
def _(grad_loss, logits):
    return logits.new_empty(logits.shape)


def _z_loss_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _z_loss_backward(ctx: Any, grad_loss: Tensor) -> Tensor:
    return run(ops.router_z_loss_backward, grad_loss.contiguous(), *ctx.saved_tensors)


register_autograd("router_z_loss_forward", _z_loss_backward, _z_loss_setup_context)
register_once_differentiable("router_z_loss_backward")


@register_fake("update_expert_bias_")
def _(selection_bias, rows_per_expert, rate):
    return None


register_in_place("update_expert_bias_")
