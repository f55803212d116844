"""The functional API. Symbols: T tokens, d hidden size, n intermediate size, E experts, K top_k,
P routed pairs, g = 2 for a gated activation, else 1. Formulas: docs/.

A wrong option is a ValueError, a wrong tensor a RuntimeError, each of the form `operation:
argument: expected X, got Y` and raised before anything is computed.
"""

import torch
from torch import Tensor

from . import _moe, _router  # noqa: F401  (register fakes and autograd)
from ._checks import check_dtype, check_leading, check_shape, check_tensors, refuse, tensor_or_none
from ._convert import autocast, constant, flat, float_logits, matrix, needs_backward, seed_of
from ._library import FORM_PAIRS, FORM_SORTED, FORM_TOP_K, ops, run
from ._main_grad import MainGradLayer, check_main_grad
from ._moe_layer import LayerOutput
from ._options import (
    expert_options,
    flag,
    loss_options,
    number,
    rounding_options,
    router_kind,
    router_options,
)

# ----------------------------------------------------------------------------------------- experts


def _experts(
    operation: str, argument: str, x: Tensor, weights: tuple, routing: tuple, options: tuple
) -> Tensor:
    """On checked arguments: x, of the name `argument`, [T, d]; `weights` w1, w2, b1, b2."""
    form, ids, token_ids, slot_weights = routing
    x, w1, w2, b1, b2 = autocast(operation, argument, x, *weights)
    save = needs_backward(x, w1, w2, b1, b2, slot_weights)
    y, _, _ = run(
        ops.moe_forward, x, w1, b1, w2, b2, form, ids, token_ids, slot_weights, *options, save
    )
    return y


def moe(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    limit: float = 7.0,
    workspace_limit: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """The experts with K slots per token: out[t] = sum_k topk_weights[t, k] * expert(x[t]).

    x [..., d]; w1 [E, g*n, d]; w2 [E, d, n] (transposed views are taken through their strides);
    topk_ids [..., K] int32|int64; topk_weights [..., K] float32|bfloat16; b1 [E, g*n]; b2 [E, d].
    Leading dimensions are the same, or flattened to one.
    An id < 0 or >= E is a dropped slot: it contributes 0 and its weight's gradient is 0.
    Gradients: x, w1, w2, b1, b2, topk_weights. Kept for backward: P*g*n elements of H and the
    routing metadata, nothing of size P*d.

    deterministic=False lets the GPU add a token's rows to y and to x's gradient in any order, each
    sum rounded to bfloat16: faster and with less scratch, but the last bits change from run to run.
    """
    check_tensors(
        "moe", x=x, w1=w1, w2=w2, topk_ids=topk_ids, topk_weights=topk_weights, b1=b1, b2=b2
    )
    check_leading("moe", x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    options = expert_options(
        "moe", activation, gate_up_layout, limit, deterministic, workspace_limit
    )
    ids, weights = flat(topk_ids).contiguous(), flat(topk_weights).contiguous()
    routing = (FORM_TOP_K, ids, None, weights)
    y = _experts("moe", "x", matrix("moe", "x", x), (w1, w2, b1, b2), routing, options)
    return y.reshape(x.shape)


def moe_sorted(
    rows: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    limit: float = 7.0,
    workspace_limit: int | None = None,
) -> Tensor:
    """The experts on rows already sorted by expert: out[r] = row_weights[r] * expert(rows[r]).

    rows [R, d]; offsets [E] int32, cumulative ends; row_weights [R] or None for 1. Rows at or past
    offsets[-1] are never read; they are zero in the output and in every gradient.
    """
    check_tensors(
        "moe_sorted", rows=rows, w1=w1, w2=w2, offsets=offsets, row_weights=row_weights,
        b1=b1, b2=b2,
    )  # fmt: skip
    deterministic = True  # there is no sum
    options = expert_options(
        "moe_sorted", activation, gate_up_layout, limit, deterministic, workspace_limit
    )
    weights = None if row_weights is None else row_weights.contiguous()
    routing = (FORM_SORTED, offsets.contiguous(), None, weights)
    x = matrix("moe_sorted", "rows", rows)
    return _experts("moe_sorted", "rows", x, (w1, w2, b1, b2), routing, options)


def moe_pairs(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    pair_weights: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    limit: float = 7.0,
    workspace_limit: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """The experts on any list of pairs: out[t] = sum of pair_weights[p] * expert_p(x[t]).

    token_ids, expert_ids [P] int32|int64 (one dtype); pair_weights [P]. Any order, duplicates
    count each time; a pair whose token or expert does not exist is dropped. deterministic as in
    `moe`.
    """
    check_tensors(
        "moe_pairs", x=x, w1=w1, w2=w2, token_ids=token_ids, expert_ids=expert_ids,
        pair_weights=pair_weights, b1=b1, b2=b2,
    )  # fmt: skip
    options = expert_options(
        "moe_pairs", activation, gate_up_layout, limit, deterministic, workspace_limit
    )
    routing = (
        FORM_PAIRS, expert_ids.contiguous(), token_ids.contiguous(), pair_weights.contiguous()
    )  # fmt: skip
    y = _experts("moe_pairs", "x", matrix("moe_pairs", "x", x), (w1, w2, b1, b2), routing, options)
    return y.reshape(x.shape)


# ------------------------------------------------------------------------------------------ router


def route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax_topk",
    renormalize: bool | None = None,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Top-K routing: (ids [..., K] int64, weights [..., K] float32) from logits [..., E].

    renormalize None: the scoring's default (on for sigmoid_topk, always for topk_softmax, off for
    softmax_topk). bias [E] float32: added for selection only (sigmoid_topk). Ties go to the lower
    index. The gradient of the weights flows to the logits.
    """
    check_tensors("route", logits=logits, bias=bias)
    rows = float_logits("route", logits)
    check_shape("route", "bias", bias, rows.shape[1])
    options = router_options(
        "route", rows.shape[1], top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    ids, weights = run(ops.route_forward, rows, constant(bias), *options)
    shape = (*logits.shape[:-1], ids.shape[1])
    return ids.reshape(shape), weights.reshape(shape)


def round_tokens(
    logits: Tensor,
    top_k: int,
    tile: int = 128,
    policy: str = "nearest",
    seed: int | Tensor = 0,
    scoring: str = "softmax_topk",
    renormalize: bool | None = None,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rounding: (token_ids [P], expert_ids [P], pair_weights [P]) for moe_pairs.

    Every expert's row count becomes a multiple of `tile`. P depends on shapes only; unused places
    hold -1. seed (policy stochastic): an int, or an int64 tensor on the device of the logits.
    """
    operation = "round_tokens"
    check_tensors(operation, logits=logits, bias=bias, seed=tensor_or_none(seed))
    rows = float_logits(operation, logits)
    check_shape(operation, "bias", bias, rows.shape[1])
    options = router_options(
        operation, rows.shape[1], top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    rounding = rounding_options(operation, tile, policy)
    seed, seed_tensor = seed_of(operation, seed)
    token_ids, expert_ids, pair_weights, *_ = run(
        ops.round_tokens_forward, rows, constant(bias), seed_tensor, *options, *rounding, seed
    )
    return token_ids, expert_ids, pair_weights


def load_balancing_loss(
    logits: Tensor,
    rows_per_expert: Tensor,
    top_k: int,
    scoring: str = "softmax_topk",
) -> Tensor:
    """Switch auxiliary loss E * sum_e f_e p_e (a scalar), f_e = rows_per_expert[e] / (T*K).

    rows_per_expert [E] int32 counts token choice, T*K in sum; counts after token rounding would
    hide what the router chose. Uniform routing gives 1. Hugging Face's value is top_k times this.
    """
    operation = "load_balancing_loss"
    check_tensors(operation, logits=logits, rows_per_expert=rows_per_expert)
    rows = float_logits(operation, logits)
    options = loss_options(operation, rows.shape[1], top_k, scoring)
    loss = run(ops.load_balancing_loss_forward, rows, rows_per_expert.contiguous(), *options)
    return loss.reshape(())


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over the tokens of logsumexp(logits)^2 (a scalar)."""
    check_tensors("router_z_loss", logits=logits)
    return run(ops.router_z_loss_forward, float_logits("router_z_loss", logits)).reshape(())


def update_expert_bias_(bias: Tensor, rows_per_expert: Tensor, rate: float) -> Tensor:
    """In place: bias[e] += rate * sign(mean(rows) - rows[e]). Returns bias.

    bias [E] float32, contiguous, without requires_grad (or under torch.no_grad()); rows_per_expert
    [E] int32 counts token choice.
    """
    operation = "update_expert_bias_"
    if bias is None:
        refuse(operation, "bias", "a tensor", "None")
    check_tensors(operation, bias=bias, rows_per_expert=rows_per_expert)
    if not torch.compiler.is_compiling() and bias.is_neg():
        refuse(operation, "bias", "a tensor to write into", "a view with the negative bit")
    rate = number(operation, "rate", rate)
    ops.update_expert_bias_(bias, rows_per_expert.contiguous(), rate)
    return bias


def _name_of(bias: Tensor | None) -> str | None:
    return None if bias is None else "bias"


# ----------------------------------------------------------------------------------- the whole layer


def run_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    router_b: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    router: str = "topk",
    tile: int = 128,
    policy: str = "nearest",
    seed: int | Tensor = 0,
    scoring: str = "softmax_topk",
    renormalize: bool | None = None,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    activation: str = "swiglu",
    gate_up_layout: str = "concatenated",
    limit: float = 7.0,
    deterministic: bool = True,
    workspace_limit: int | None = None,
    main_grad: bool = False,
) -> LayerOutput:
    """moe_layer with everything it computes; y and logits are [T, ...]."""
    operation = "moe_layer"
    check_tensors(
        operation, x=x, router_w=router_w, w1=w1, w2=w2, router_b=router_b, b1=b1, b2=b2,
        bias=bias, seed=tensor_or_none(seed),
    )  # fmt: skip
    num_experts = _checked_experts(x, router_w, w1, router_b, bias)
    *experts, workspace_limit = expert_options(
        operation, activation, gate_up_layout, limit, deterministic, workspace_limit
    )
    routing = router_options(
        operation, num_experts, top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    rounding = (router_kind(operation, router), *rounding_options(operation, tile, policy))
    seed, seed_tensor = seed_of(operation, seed)
    if flag(operation, "main_grad", main_grad):
        check_main_grad(x)

    x = matrix(operation, "x", x)
    x, w1, w2, b1, b2 = autocast(operation, "x", x, w1, w2, b1, b2)
    check_dtype(operation, "router_w", router_w, x.dtype, torch.float32)
    check_dtype(operation, "router_b", router_b, router_w.dtype, torch.float32)
    save = needs_backward(x, router_w, router_b, w1, w2, b1, b2)
    inputs = (
        x, router_w, router_b, w1, b1, w2, b2, constant(bias), seed_tensor, *experts, *routing,
        *rounding, workspace_limit, seed, save,
    )  # fmt: skip
    if main_grad and save:
        return LayerOutput(*MainGradLayer.call(*inputs))
    return LayerOutput(*run(ops.moe_layer_forward, *inputs))


def _checked_experts(x, router_w, w1, router_b, bias) -> int:
    """E, to which the router's tensors have to fit."""
    num_experts = w1.shape[0]
    if num_experts == 0:
        refuse("moe_layer", "w1", "at least one expert", f"shape {list(w1.shape)}")
    check_shape("moe_layer", "router_w", router_w, num_experts, x.shape[-1])
    check_shape("moe_layer", "router_b", router_b, num_experts)
    check_shape("moe_layer", "bias", bias, num_experts)
    return num_experts


def moe_layer(
    x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, top_k: int, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Router GEMM, routing and experts as one autograd node.

    Returns (y [..., d], logits [..., E] float32, rows_per_expert [E] int32); gradients flow from y
    and from the logits (auxiliary losses). rows_per_expert counts token choice, before any
    rounding: what `load_balancing_loss` and `update_expert_bias_` take. router_w [E, d], of the
    dtype of x or float32.

    Options (keyword only): router_b [E]; b1, b2; router "topk" | "token_rounding" with tile,
    policy, seed; scoring, renormalize, bias, num_groups, top_groups, scale as in `route`;
    activation, gate_up_layout, limit, workspace_limit, deterministic as in `moe`.
    """
    out = run_layer(x, router_w, w1, w2, top_k, **options)
    logits = out.logits.reshape(*x.shape[:-1], out.logits.shape[-1])
    return out.y.reshape(x.shape), logits, out.rows_per_expert_before
