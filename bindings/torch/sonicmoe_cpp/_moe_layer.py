"""Fake implementations and autograd of the whole layer (csrc/moe_layer_ops.cpp)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import called_by_nodes, register_autograd, register_once_differentiable
from ._library import (
    FORM_PAIRS,
    FORM_TOP_K,
    gate_factor,
    in_steps,
    metadata_bytes,
    register_fake,
    rounded_capacity,
    row_capacity,
    run,
)
from ._moe import dropped_like, handed_on, new_gradient
from .options import LayerOptions

PARAMETERS = ("router_weight", "router_bias", "w1", "b1", "w2", "b2")


class LayerOutput(NamedTuple):
    """Results of moe_layer_forward; only y and logits carry gradients."""

    y: Tensor  # [..., d], as x
    logits: Tensor  # [..., E] float32
    rows_per_expert: Tensor  # [E] int32: rows computed, after any rounding
    topk_ids: Tensor  # [T, K] int32: token choice, before any rounding
    token_ids: Tensor  # [P] int32, token rounding only
    expert_ids: Tensor  # [P] int32, token rounding only
    routing_weights: Tensor  # float32: [T, K] of topk_ids, or [P] of the list of token rounding
    h: Tensor  # [C, g*n]
    metadata: Tensor  # uint8
    rows_dropped: Tensor  # [1] int32, empty without max_rows

    @property
    def rows_per_expert_before(self) -> Tensor:
        """[E] int32 of token choice: what the balancing loss and the bias update take."""
        rounded = self.routing_weights.dim() == 1
        if not rounded:
            return self.rows_per_expert
        return count_rows(self.topk_ids, self.logits.shape[-1])


def count_rows(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[E] int32: how often each expert stands in topk_ids."""
    # Unlike bincount, histc never waits for the GPU; on the CPU it takes floats only.
    ids = topk_ids.float() if topk_ids.device.type == "cpu" else topk_ids
    return torch.histc(ids, num_experts, 0, num_experts - 1).int()


@register_fake("moe_layer_forward")
def _(
    x, router_weight, router_bias, w1, b1, w2, b2, selection_bias, seed_tensor, options, reals,
    save_for_backward,
):  # fmt: skip
    layer = LayerOptions.unpack(iter(options), iter(reals))
    rounding, top_k = layer.rounding, layer.router.top_k
    num_tokens = math.prod(x.shape[:-1])
    num_experts = w1.shape[0]
    pairs = num_tokens * top_k
    if rounding is not None:
        pairs = rounded_capacity(num_tokens, num_experts, top_k, rounding.tile, rounding.policy)
    form = FORM_TOP_K if rounding is None else FORM_PAIRS
    listed = (0,) if rounding is None else (pairs,)
    columns = gate_factor(layer.experts.activation) * w2.shape[2]
    rows = row_capacity(pairs, layer.experts.max_rows)
    size = metadata_bytes(form, num_tokens, pairs, rows, num_experts)

    def empty(shape, dtype=x.dtype):
        return x.new_empty(shape, dtype=dtype)

    return LayerOutput(
        y=empty(x.shape),
        logits=empty((*x.shape[:-1], num_experts), torch.float32),
        rows_per_expert=empty((num_experts,), torch.int32),
        topk_ids=empty((num_tokens, top_k), torch.int32),
        token_ids=empty(listed, torch.int32),
        expert_ids=empty(listed, torch.int32),
        routing_weights=empty((num_tokens, top_k) if rounding is None else listed, torch.float32),
        h=empty((rows, columns) if save_for_backward else (0,)),
        metadata=empty((size,) if save_for_backward else (0,), torch.uint8),
        rows_dropped=dropped_like(x, layer.experts),
    )


@register_fake("moe_layer_backward")
def _(
    grad_out, grad_logits, x, router_weight, router_bias, w1, b1, w2, b2, saved, options, reals,
    needs, main_grads,
):  # fmt: skip
    need_x, *others = needs
    parameters = (router_weight, router_bias, w1, b1, w2, b2)
    grads = _gradients("moe_layer_backward", x, PARAMETERS, others, parameters, main_grads)
    return x.new_empty(x.shape if need_x else (0,)), *grads


def _gradients(operation, x, names, needs, parameters, main_grads) -> tuple[Tensor, ...]:
    fresh = [need and not main_grads for need in needs]
    return tuple(
        new_gradient(operation, x, f"grad_{name}", *given)
        for name, *given in zip(names, fresh, parameters, strict=True)
    )


@register_fake("moe_layer_backward_hidden")
def _(grad_out, x, router_weight, w1, b1, w2, b2, saved, options, reals):
    *_, routing_weights, _, h = saved
    layer = LayerOptions.unpack(iter(options), iter(reals))
    top_k = layer.router.top_k if layer.rounding is None else None
    return *handed_on(x, w1, w2, h, top_k, layer.experts), torch.empty_like(routing_weights)


@register_fake("moe_layer_backward_down")
def _(
    grad_out, x, router_weight, w1, b1, w2, b2, saved, options, reals, needs, main_grads
):  # fmt: skip
    return _gradients("moe_layer_backward_down", x, ("w2", "b2"), needs, (w2, b2), main_grads)


@register_fake("moe_layer_backward_up")
def _(
    x, grad_logits, router_weight, router_bias, w1, b1, w2, b2, saved, options, reals, needs,
    main_grads,
):  # fmt: skip
    need_x, *others = needs
    parameters = (router_weight, router_bias, w1, b1)
    grads = _gradients("moe_layer_backward_up", x, PARAMETERS[:4], others, parameters, main_grads)
    return x.new_empty(x.shape if need_x else (0,)), *grads


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what backward needs; `inputs` are the operator's arguments, `output` its results."""
    (
        x, router_weight, router_bias, w1, b1, w2, b2, _selection_bias, _seed, options, reals, save,
    ) = inputs  # fmt: skip
    if not save:
        raise RuntimeError("moe_layer_forward: a gradient is needed but save_for_backward is off")
    _, logits, rows, *saved, rows_dropped = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows, *saved, rows_dropped)
    # No selection bias: it has selected and may change.
    ctx.save_for_backward(x, router_weight, router_bias, w1, b1, w2, b2, logits, *saved)
    ctx.options = options, reals


_whole, _hidden, _down, _up = (
    called_by_nodes(f"moe_layer_backward{step}") for step in ("", "_hidden", "_down", "_up")
)


def run_backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_logits: Tensor | None,
    needs: tuple[bool, ...],
    main_grads: tuple[Tensor, ...] = (),
) -> tuple:
    """The gradients of all arguments of forward, None where not needed. Of the parameters they are
    added to main_grads where there are any, one for each that is needed."""
    # Once: checkpointing recomputes on the first access only.
    x, router_weight, router_bias, w1, b1, w2, b2, *saved = ctx.saved_tensors
    # Incoming gradients are dense; that of y is zero where only the logits were used.
    grad_out = torch.zeros_like(x) if grad_out is None else grad_out.contiguous()
    grad_logits = None if grad_logits is None else grad_logits.contiguous()
    if in_steps(saved[-2]):
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept
        grads = _backward_in_steps(
            grad_out, grad_logits, (x, router_weight, router_bias, w1, b1, w2, b2), saved,
            ctx.options, needs, main_grads,
        )  # fmt: skip
    else:
        grads = run(
            _whole,
            grad_out, grad_logits, x, router_weight, router_bias, w1, b1, w2, b2, saved,
            *ctx.options, needs, main_grads,
        )  # fmt: skip
    others = len(ctx.needs_input_grad) - len(needs)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * others


def _backward_in_steps(
    grad_out: Tensor,
    grad_logits: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    saved: list[Tensor],
    options: tuple,
    needs: tuple[bool, ...],
    main_grads: tuple[Tensor, ...],
) -> tuple:
    """moe_layer_backward by three operators. Empties `saved`, which holds H's last name."""
    x, router_weight, router_bias, *experts = inputs
    *routing, h, metadata = saved
    saved.clear()
    routing.append(metadata)
    grad_h, scaled_a, row_lists, grad_routing_weights = run(
        _hidden,
        grad_out, x, router_weight, *experts, [*routing, h], *options,
    )  # fmt: skip
    del h
    need_x, *need_router, need_w1, need_b1, need_w2, need_b2 = needs
    # In the order of the parameters: those of down come last.
    of_down = (need_w2 + need_b2) if main_grads else 0
    split = len(main_grads) - of_down
    grad_w2, grad_b2 = run(
        _down,
        grad_out, x, router_weight, *experts, [*routing, scaled_a, row_lists], *options,
        (need_w2, need_b2), main_grads[split:],
    )  # fmt: skip
    del scaled_a
    grads = run(
        _up,
        x, grad_logits, router_weight, router_bias, *experts,
        [*routing, grad_h, row_lists, grad_routing_weights], *options,
        (need_x, *need_router, need_w1, need_b1), main_grads[:split],
    )  # fmt: skip
    return *grads, grad_w2, grad_b2


def _backward(ctx: Any, grad_out: Tensor | None, grad_logits: Tensor | None, *unused: None):
    needs = ctx.needs_input_grad
    if grad_out is None and grad_logits is None:
        return (None,) * len(needs)
    return run_backward(ctx, grad_out, grad_logits, needs[: 1 + len(PARAMETERS)])


register_autograd("moe_layer_forward", _backward, save_for_backward)
for name in ("", "_hidden", "_down", "_up"):
    register_once_differentiable(f"moe_layer_backward{name}")
