"""FLOP formulas of the operators for `torch.utils.flop_counter`. Imported after that module, by
_after_import.py.

As torch counts: two for each multiply-add of a matrix product, nothing for activations, selection
and sums. With R rows and W = g*n*d + d*n weights of an expert:

    experts, forward    2 R W               logits, forward     2 T d E
    experts, backward   2 R W for dX (or its parts), 2 R W for dW1 and dW2
    logits, backward    2 T d E each for dX and dWr

R counts from shapes alone, since the counts of rows lie on the device: T*K slots for top-K, and
for token rounding, which leaves their number about as it is; the rows of x where they are sorted;
the length of a list of pairs, its unused places included; of an exchange the slots of the rank's
own tokens, which is its share of all ranks' rows. Padding to tiles never counts.
"""

import math
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from ._library import FORM_SORTED, ops

Shape = tuple[int, ...]  # a formula gets shapes in place of tensors


def _up(rows: int, w1: Shape) -> int:
    """Of X W1 and of its gradients dX and dW1, each."""
    return 2 * rows * w1[1] * w1[2]


def _down(rows: int, w2: Shape) -> int:
    """Of A W2 and of its gradients dA and dW2, each."""
    return 2 * rows * w2[1] * w2[2]


def _experts_backward(
    rows: int, w1: Shape, w2: Shape, needs_dh: bool, x: bool, dw1: bool, dw2: bool
) -> int:
    return _down(rows, w2) * (needs_dh + dw2) + _up(rows, w1) * (x + dw1)


@register_flop_formula(ops.moe_forward)
def _moe_forward(
    x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, form: int, ids: Shape, *rest: Any, **out: Any
) -> int:
    rows = math.prod(x[:-1] if form == FORM_SORTED else ids)
    return _up(rows, w1) + _down(rows, w2)


@register_flop_formula(ops.moe_backward)
def _moe_backward(
    grad_out: Shape, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, form: int, ids: Shape,
    token_ids: Any, weights: Any, saved: Any, options: Any, reals: Any, needs: list[bool],
    **out: Any,
) -> int:  # fmt: skip
    need_x, need_w1, need_b1, need_w2, _, need_weights = needs
    rows = math.prod(x[:-1] if form == FORM_SORTED else ids)
    needs_dh = need_x or need_w1 or need_b1 or need_weights
    return _experts_backward(rows, w1, w2, needs_dh, need_x, need_w1, need_w2)


def _logits(x: Shape, router_weight: Shape) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(router_weight)


@register_flop_formula(ops.moe_layer_forward)
def _moe_layer_forward(
    x: Shape, router_weight: Shape, router_bias: Any, w1: Shape, b1: Any, w2: Shape, *rest: Any,
    out_shape: tuple[Shape, ...], **out: Any,
) -> int:  # fmt: skip
    rows = math.prod(out_shape[3])  # topk_ids [T, K]
    return _logits(x, router_weight) + _up(rows, w1) + _down(rows, w2)


@register_flop_formula(ops.moe_layer_backward)
def _moe_layer_backward(
    grad_out: Shape, grad_logits: Any, x: Shape, router_weight: Shape, router_bias: Any, w1: Shape,
    b1: Any, w2: Shape, b2: Any, saved: list[Shape], options: Any, reals: Any, needs: list[bool],
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    need_x, need_router_weight, need_router_bias, need_w1, need_b1, need_w2, _ = needs
    rows = math.prod(saved[1])  # topk_ids [T, K]
    needs_dh = need_x or need_router_weight or need_router_bias or need_w1 or need_b1
    experts = _experts_backward(rows, w1, w2, needs_dh, need_x, need_w1, need_w2)
    return experts + _logits(x, router_weight) * (need_x + need_router_weight)


# The same in three steps: dH with dS, what W2 needs, what X and W1 need.


@register_flop_formula(ops.moe_backward_hidden)
def _moe_backward_hidden(
    grad_out: Shape, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, form: int, ids: Shape,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    return _down(math.prod(x[:-1] if form == FORM_SORTED else ids), w2)


@register_flop_formula(ops.moe_backward_down)
def _moe_backward_down(
    grad_out: Shape, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, form: int, ids: Shape,
    token_ids: Any, weights: Any, saved: Any, options: Any, reals: Any, needs: list[bool],
    **out: Any,
) -> int:  # fmt: skip
    return _down(math.prod(x[:-1] if form == FORM_SORTED else ids), w2) * needs[0]


@register_flop_formula(ops.moe_backward_up)
def _moe_backward_up(
    x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, form: int, ids: Shape, token_ids: Any,
    weights: Any, saved: Any, options: Any, reals: Any, needs: list[bool], **out: Any,
) -> int:  # fmt: skip
    rows = math.prod(x[:-1] if form == FORM_SORTED else ids)
    return _up(rows, w1) * (needs[0] + needs[1])


@register_flop_formula(ops.moe_layer_backward_hidden)
def _moe_layer_backward_hidden(
    grad_out: Shape, x: Shape, router_weight: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any,
    saved: list[Shape], *rest: Any, **out: Any,
) -> int:  # fmt: skip
    return _down(math.prod(saved[1]), w2)


@register_flop_formula(ops.moe_layer_backward_down)
def _moe_layer_backward_down(
    grad_out: Shape, x: Shape, router_weight: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any,
    saved: list[Shape], options: Any, reals: Any, needs: list[bool], *rest: Any, **out: Any,
) -> int:  # fmt: skip
    return _down(math.prod(saved[1]), w2) * needs[0]


@register_flop_formula(ops.moe_layer_backward_up)
def _moe_layer_backward_up(
    x: Shape, grad_logits: Any, router_weight: Shape, router_bias: Any, w1: Shape, b1: Any,
    w2: Shape, b2: Any, saved: list[Shape], options: Any, reals: Any, needs: list[bool],
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    need_x, need_router_weight, _, need_w1, _ = needs
    experts = _up(math.prod(saved[1]), w1) * (need_x + need_w1)
    return experts + _logits(x, router_weight) * (need_x + need_router_weight)


@register_flop_formula(ops.ep_moe_forward)
def _ep_moe_forward(
    x: Shape, exchange: int, ids: Shape, weights: Shape, w1: Shape, b1: Any, w2: Shape,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    rows = math.prod(ids)
    return _up(rows, w1) + _down(rows, w2)


@register_flop_formula(ops.ep_moe_backward)
def _ep_moe_backward(
    grad_out: Shape, x: Shape, exchange: int, ids: Shape, weights: Shape, w1: Shape, b1: Any,
    w2: Shape, b2: Any, saved: Any, options: Any, reals: Any, needs: list[bool], **out: Any,
) -> int:  # fmt: skip
    need_w1, _, need_w2, _ = needs
    return _experts_backward(math.prod(ids), w1, w2, True, True, need_w1, need_w2)


@register_flop_formula(ops.router_logits_forward)
def _router_logits_forward(x: Shape, router_weight: Shape, *rest: Any, **out: Any) -> int:
    return _logits(x, router_weight)


@register_flop_formula(ops.router_logits_backward)
def _router_logits_backward(
    grad_logits: Shape, x: Shape, router_weight: Shape, router_bias: Any, needs: list[bool],
    **out: Any,
) -> int:  # fmt: skip
    return _logits(x, router_weight) * (needs[0] + needs[1])


@register_flop_formula(
    [
        ops.route_forward, ops.route_backward,
        ops.round_tokens_forward, ops.round_tokens_to_forward, ops.round_tokens_backward,
        ops.load_balancing_loss_forward, ops.load_balancing_loss_backward,
        ops.router_z_loss_forward, ops.router_z_loss_backward,
        ops.update_expert_bias_, ops.exchange_bytes, ops.exchange_open,
    ]
)  # fmt: skip
def _no_products(*given: Any, **out: Any) -> int:
    return 0
