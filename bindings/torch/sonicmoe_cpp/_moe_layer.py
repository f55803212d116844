"""Fake implementations and autograd of the whole layer (csrc/moe_layer_ops.cpp)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import (
    FORM_PAIRS,
    FORM_TOP_K,
    gate_factor,
    metadata_bytes,
    no_double_backward,
    ops,
    rounded_capacity,
    run,
)
from ._moe import grad_like


class LayerOutput(NamedTuple):
    """Results of moe_layer_forward; only y and logits carry gradients."""

    y: Tensor  # [T, d]
    logits: Tensor  # [T, E] float32
    rows_per_expert: Tensor  # [E] int32
    topk_ids: Tensor  # [T, K] int32: token choice
    token_ids: Tensor  # [P] int32, token rounding only
    expert_ids: Tensor  # [P] int32, token rounding only
    pair_weights: Tensor  # [T, K] or [P] float32
    h: Tensor  # [P, g*n]
    metadata: Tensor  # uint8


@torch.library.register_fake("sonicmoe_cpp::moe_layer_forward")
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


@torch.library.register_fake("sonicmoe_cpp::moe_layer_backward")
def _(
    grad_out, grad_logits, x, router_weight, router_bias, w1, b1, w2, b2, selection_bias, logits,
    topk_ids, token_ids, expert_ids, pair_weights, h, metadata, activation, gate_up_layout, limit,
    deterministic, top_k, scoring, renormalize, num_groups, top_groups, scale, rounding, tile,
    policy, workspace_limit, need_x, need_router_weight, need_router_bias, need_w1, need_b1,
    need_w2, need_b2,
):  # fmt: skip
    def bias_grad(needed, bias):
        return bias.new_empty(bias.shape) if needed else x.new_empty((0,))

    router = torch.empty_like(router_weight)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        router if need_router_weight else router_weight.new_empty((0,)),
        bias_grad(need_router_bias, router_bias),
        grad_like(need_w1, w1, x),
        bias_grad(need_b1, b1),
        grad_like(need_w2, w2, x),
        bias_grad(need_b2, b2),
    )


@torch.library.register_fake("sonicmoe_cpp::moe_layer_backward_accumulate")
def _(grad_out, grad_logits, x, *rest):
    need_x = rest[28]
    return x.new_empty(x.shape if need_x else (0,))


def _save(ctx, inputs, output):
    """Keeps what backward needs; `inputs` are the operator's arguments, `output` its results."""
    parameters, options, save_for_backward = inputs[:8], inputs[9:23], inputs[24]
    if not save_for_backward:
        raise RuntimeError("moe_layer_forward: a gradient is needed but save_for_backward is off")
    _, logits, rows, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows, *saved)
    ctx.save_for_backward(*parameters, logits, *saved)
    ctx.options = options


def _incoming(x, grad_out, grad_logits):
    """Dense gradients of y and logits; zeros for y when only the logits were used."""
    grad_out = torch.zeros_like(x) if grad_out is None else grad_out.contiguous()
    return grad_out, None if grad_logits is None else grad_logits.contiguous()


def _backward(ctx, grad_out, grad_logits, *unused):
    none = (None,) * 25
    if grad_out is None and grad_logits is None:
        return none
    saved = ctx.saved_tensors  # once: checkpointing recomputes on the first access only
    grad_out, grad_logits = _incoming(saved[0], grad_out, grad_logits)
    needs = ctx.needs_input_grad[:7]
    grads = run(ops.moe_layer_backward, grad_out, grad_logits, *saved, *ctx.options, *needs)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), *none[7:]


torch.library.register_autograd("sonicmoe_cpp::moe_layer_forward", _backward, setup_context=_save)
torch.library.register_autograd("sonicmoe_cpp::moe_layer_backward", no_double_backward)


class MainGradLayer(torch.autograd.Function):
    """The layer with parameter gradients accumulated into `param.main_grad` (float32).

    Follows the protocol of Megatron and Transformer Engine: the buffer is looked up at backward
    (`get_main_grad()` or `main_grad`), overwritten where `overwrite_main_grad` is set, and a
    parameter that has the attribute `grad_added_to_main_grad` gets it set to True and a zero
    gradient (so that its hooks fire); any other parameter gets no `.grad`.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = run(ops.moe_layer_forward, *inputs)
        _save(ctx, inputs, output)
        ctx.parameters = inputs[1:7]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_logits, *unused):
        none = (None,) * 25
        if grad_out is None and grad_logits is None:
            return none
        saved = ctx.saved_tensors
        grad_out, grad_logits = _incoming(saved[0], grad_out, grad_logits)
        needs = ctx.needs_input_grad
        buffers = [
            _main_grad(parameter) if needed else None
            for parameter, needed in zip(ctx.parameters, needs[1:7], strict=True)
        ]
        grad_x = run(
            ops.moe_layer_backward_accumulate,
            grad_out,
            grad_logits,
            *saved,
            *ctx.options,
            needs[0],
            *buffers,
        )
        dummies = [
            None if buffer is None else _mark_added(parameter)
            for parameter, buffer in zip(ctx.parameters, buffers, strict=True)
        ]
        return grad_x if needs[0] else None, *dummies, *none[7:]


def _main_grad(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "get_main_grad"):
        buffer = parameter.get_main_grad()
    else:
        buffer = getattr(parameter, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32 or buffer.shape != parameter.shape:
        got = "none" if buffer is None else f"{buffer.dtype} {list(buffer.shape)}"
        raise RuntimeError(
            f"main_grad: expected a float32 buffer {list(parameter.shape)} on the parameter, "
            f"got {got}"
        )
    if getattr(parameter, "overwrite_main_grad", False):
        buffer.zero_()
    return buffer


def _mark_added(parameter: Tensor) -> Tensor | None:
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return parameter.new_zeros(()).expand(parameter.shape)
