"""The functional API. Symbols: T tokens, d hidden size, n intermediate size, E experts, K top_k,
P routed pairs, g = 2 for a gated activation, else 1. Formulas: docs/.

Options are keywords; what each may be stands in options.py. A wrong option is a ValueError, a wrong
tensor a RuntimeError, each of the form `operation: argument: expected X, got Y` and raised before
anything is computed.
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import _moe, _router  # noqa: F401  (register fakes and autograd)
from ._checks import check_dtype, check_leading, check_shape, check_tensors, refuse, tensor_or_none
from ._convert import (
    autocast,
    constant,
    flat,
    float_logits,
    matrix,
    needs_backward,
    rows_of,
    seed_of,
)
from ._library import FORM_PAIRS, FORM_SORTED, FORM_TOP_K, ops, run
from ._main_grad import MainGradLayer, check_main_grad
from ._moe_layer import LayerOutput
from ._rules import FLAG, Number
from .options import (
    ExpertKeywords,
    ExpertOptions,
    LayerKeywords,
    Packed,
    RoundingOptions,
    RoutedExpertKeywords,
    RoutedExpertOptions,
    RouterAndRoundingKeywords,
    RouterKeywords,
    RouterOptions,
    packed_experts,
    packed_layer,
    packed_loss,
    packed_rounding,
    packed_router,
    packed_sorted,
    with_keywords,
)

# ----------------------------------------------------------------------------------------- experts

Experts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w1, w2, b1, b2
Routing = tuple[int, Tensor, Tensor | None, Tensor | None]  # form, ids, token ids, weights


def _run_experts(
    operation: str,
    x: Tensor,
    experts: Experts,
    routing: Routing,
    options: Packed,
    rows_dropped: Tensor | None = None,
) -> Tensor:
    """y, of the shape of x; on checked arguments."""
    x = rows_of(operation, "x", x)
    x, w1, w2, b1, b2 = autocast(operation, x, *experts)
    save = needs_backward(x, w1, w2, b1, b2, routing[3])
    y, _, _, dropped = run(ops.moe_forward, x, w1, b1, w2, b2, *routing, *options, save)
    _count(rows_dropped, dropped)
    return y


def _count(rows_dropped: Tensor | None, dropped: Tensor) -> None:
    """Adds what a call dropped, where the caller counts it and max_rows is set."""
    if rows_dropped is not None and dropped.numel() > 0:
        rows_dropped.add_(dropped)


@with_keywords(RoutedExpertOptions)
def moe(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    rows_dropped: Tensor | None = None,
    **options: Unpack[RoutedExpertKeywords],
) -> Tensor:
    """The experts with K slots per token: out[t] = sum_k topk_weights[t, k] * expert(x[t]).

    x [..., d]; w1 [E, g*n, d]; w2 [E, d, n] (transposed views are taken through their strides);
    topk_ids [..., K] int32|int64; topk_weights [..., K] float32|bfloat16; b1 [E, g*n]; b2 [E, d].
    Leading dimensions are the same, or flattened to one.
    An id outside first_expert .. first_expert + E - 1 is a dropped slot: it contributes 0 and its
    weight's gradient is 0.
    Gradients: x, w1, w2, b1, b2, topk_weights. Kept for backward: P*g*n elements of H and the
    routing metadata, nothing of size P*d.

    max_rows bounds the rows of H and of all scratch, which otherwise have room for every slot.
    Slots beyond it, those of the last experts, are dropped slots; their number is added to
    rows_dropped [1] int32, without waiting for the GPU. zero_absent_tokens=False leaves rows of y
    and of x's gradient undefined where a token has no row, for callers that never read those.

    deterministic=False lets the GPU add a token's rows to y and to x's gradient in any order, each
    sum rounded to bfloat16: faster and with less scratch, but the last bits change from run to run.
    """
    check_tensors(
        "moe", x=x, w1=w1, w2=w2, topk_ids=topk_ids, topk_weights=topk_weights, b1=b1, b2=b2,
        rows_dropped=rows_dropped,
    )  # fmt: skip
    check_shape("moe", "rows_dropped", rows_dropped, 1)
    check_leading("moe", x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    packed = packed_experts("moe", **options)
    ids, weights = flat(topk_ids).contiguous(), flat(topk_weights).contiguous()
    routing = (FORM_TOP_K, ids, None, weights)
    return _run_experts("moe", x, (w1, w2, b1, b2), routing, packed, rows_dropped)


@with_keywords(ExpertOptions)
def moe_sorted(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    **options: Unpack[ExpertKeywords],
) -> Tensor:
    """The experts on rows already sorted by expert: out[r] = row_weights[r] * expert(x[r]).

    x [R, d]; offsets [E] int32, cumulative ends; row_weights [R] or None for 1. Rows at or past
    offsets[-1] are never read; they are zero in the output and in every gradient. There is no sum,
    so `deterministic` changes nothing.
    """
    check_tensors(
        "moe_sorted", x=x, w1=w1, w2=w2, offsets=offsets, row_weights=row_weights, b1=b1, b2=b2
    )
    if x.dim() != 2:
        refuse("moe_sorted", "x", "2 dimensions", f"shape {list(x.shape)}")
    packed = packed_sorted("moe_sorted", **options)
    weights = None if row_weights is None else row_weights.contiguous()
    routing = (FORM_SORTED, offsets.contiguous(), None, weights)
    return _run_experts("moe_sorted", x, (w1, w2, b1, b2), routing, packed)


@with_keywords(RoutedExpertOptions)
def moe_pairs(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    pair_weights: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    rows_dropped: Tensor | None = None,
    **options: Unpack[RoutedExpertKeywords],
) -> Tensor:
    """The experts on any list of pairs: out[t] = sum of pair_weights[p] * expert_p(x[t]).

    token_ids, expert_ids [P] int32|int64 (one dtype); pair_weights [P]. Any order, duplicates
    count each time; a pair whose token or expert does not exist is dropped. deterministic,
    first_expert, max_rows, rows_dropped and zero_absent_tokens as in `moe`.
    """
    check_tensors(
        "moe_pairs", x=x, w1=w1, w2=w2, token_ids=token_ids, expert_ids=expert_ids,
        pair_weights=pair_weights, b1=b1, b2=b2, rows_dropped=rows_dropped,
    )  # fmt: skip
    check_shape("moe_pairs", "rows_dropped", rows_dropped, 1)
    packed = packed_experts("moe_pairs", **options)
    lists = expert_ids.contiguous(), token_ids.contiguous(), pair_weights.contiguous()
    routing = (FORM_PAIRS, *lists)
    return _run_experts("moe_pairs", x, (w1, w2, b1, b2), routing, packed, rows_dropped)


# ------------------------------------------------------------------------------------------ router


def router_logits(x: Tensor, router_weight: Tensor, router_bias: Tensor | None = None) -> Tensor:
    """x router_weight^T + router_bias: logits [..., E] float32, with the bits of `moe_layer`.

    x [..., d] float32|bfloat16; router_weight [E, d], in the dtype of x or float32; router_bias
    [E], in the dtype of router_weight or float32. Sums are float32, without a float32 copy of x.
    Gradients: x, router_weight, router_bias. On a GPU x is bfloat16 and d a multiple of 8.
    """
    operation = "router_logits"
    check_tensors(operation, x=x, router_weight=router_weight, router_bias=router_bias)
    num_experts = router_weight.shape[0]
    check_shape(operation, "router_weight", router_weight, num_experts, x.shape[-1])
    check_shape(operation, "router_bias", router_bias, num_experts)
    (rows,) = autocast(operation, matrix(operation, "x", x))
    check_dtype(operation, "router_weight", router_weight, rows.dtype, torch.float32)
    check_dtype(operation, "router_bias", router_bias, router_weight.dtype, torch.float32)
    logits = run(ops.router_logits_forward, rows, router_weight, router_bias)
    return logits if x.dim() == 2 else logits.reshape(*x.shape[:-1], num_experts)


@with_keywords(RouterOptions)
def route(
    logits: Tensor,
    top_k: int,
    *,
    selection_bias: Tensor | None = None,
    **options: Unpack[RouterKeywords],
) -> tuple[Tensor, Tensor]:
    """Top-K routing: (ids [..., K] int64, weights [..., K] float32) from logits [..., E].

    renormalize None: the scoring's default (on for sigmoid_topk, always for topk_softmax, off for
    softmax_topk). selection_bias [E] float32: added for selection only (sigmoid_topk). Ties go to
    the lower index. The gradient of the weights flows to the logits.
    """
    check_tensors("route", logits=logits, selection_bias=selection_bias)
    rows = float_logits("route", logits)
    num_experts, biased = rows.shape[1], selection_bias is not None
    check_shape("route", "selection_bias", selection_bias, num_experts)
    packed = packed_router("route", num_experts, biased, top_k=top_k, **options)
    ids, weights = run(ops.route_forward, rows, constant(selection_bias), *packed)
    shape = (*logits.shape[:-1], ids.shape[1])
    return ids.reshape(shape), weights.reshape(shape)


@with_keywords(RoundingOptions, RouterOptions)
def round_tokens(
    logits: Tensor,
    top_k: int,
    *,
    seed: int | Tensor = 0,
    selection_bias: Tensor | None = None,
    **options: Unpack[RouterAndRoundingKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Token rounding: (token_ids [P], expert_ids [P], pair_weights [P]) for moe_pairs.

    Every expert's row count becomes a multiple of `tile`. P depends on shapes only; unused places
    hold -1. seed (policy stochastic): an int, or an int64 tensor on the device of the logits.
    """
    operation = "round_tokens"
    check_tensors(
        operation, logits=logits, selection_bias=selection_bias, seed=tensor_or_none(seed)
    )
    rows = float_logits(operation, logits)
    num_experts, biased = rows.shape[1], selection_bias is not None
    check_shape(operation, "selection_bias", selection_bias, num_experts)
    number, seed_tensor = seed_of(operation, seed)
    packed = packed_rounding(operation, num_experts, biased, top_k=top_k, seed=number, **options)
    token_ids, expert_ids, pair_weights, *_ = run(
        ops.round_tokens_forward, rows, constant(selection_bias), seed_tensor, *packed
    )
    return token_ids, expert_ids, pair_weights


def load_balancing_loss(
    logits: Tensor,
    rows_per_expert: Tensor,
    top_k: int,
    scoring: str = "softmax_topk",
    *,
    group: Any = None,
) -> Tensor:
    """Switch auxiliary loss E * sum_e f_e p_e (a scalar), f_e = rows_per_expert[e] / (T*K).

    rows_per_expert [E] int32 counts token choice, T*K in sum; counts after token rounding would
    hide what the router chose. Uniform routing gives 1. Hugging Face's value is top_k times this.

    group: a process group whose ranks have as many tokens each. f_e then counts the tokens of all,
    so that the mean of the ranks' losses, whose gradients averaging gives, is the loss of one
    process with all tokens. Collective; rows_per_expert stays this rank's.
    """
    operation = "load_balancing_loss"
    check_tensors(operation, logits=logits, rows_per_expert=rows_per_expert)
    rows = float_logits(operation, logits)
    packed = packed_loss(operation, rows.shape[1], top_k, scoring)
    counts = _counts_of(rows_per_expert, group)
    if group is None:
        return run(ops.load_balancing_loss_forward, rows, counts, *packed).reshape(())
    # The operator takes counts of its own tokens alone.
    scores = rows.sigmoid() if scoring == "sigmoid_topk" else rows.softmax(-1)
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return rows.shape[1] * (counts / counts.sum() * share).sum()


def _counts_of(rows_per_expert: Tensor, group: Any) -> Tensor:
    """Summed over the ranks of a group."""
    if group is None:
        return rows_per_expert.contiguous()
    summed = torch.distributed._functional_collectives.all_reduce(rows_per_expert, "sum", group)
    return torch.distributed._functional_collectives.wait_tensor(summed)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over the tokens of logsumexp(logits)^2 (a scalar)."""
    check_tensors("router_z_loss", logits=logits)
    return run(ops.router_z_loss_forward, float_logits("router_z_loss", logits)).reshape(())


def update_expert_bias_(
    selection_bias: Tensor, rows_per_expert: Tensor, rate: float, *, group: Any = None
) -> Tensor:
    """In place: selection_bias[e] += rate * sign(mean(rows) - rows[e]). Returns selection_bias.

    selection_bias [E] float32, contiguous, without requires_grad (or under torch.no_grad());
    rows_per_expert [E] int32 counts token choice. group: a process group over whose ranks they are
    summed first (collective), so that the bias keeps the same bits on all of them.
    """
    operation = "update_expert_bias_"
    if selection_bias is None:
        refuse(operation, "selection_bias", "a tensor", "None")
    check_tensors(operation, selection_bias=selection_bias, rows_per_expert=rows_per_expert)
    if not torch.compiler.is_compiling() and selection_bias.is_neg():
        got = "a view with the negative bit"
        refuse(operation, "selection_bias", "a tensor to write into", got)
    rate = Number().check(operation, "rate", rate)
    ops.update_expert_bias_(selection_bias, _counts_of(rows_per_expert, group), rate)
    return selection_bias


# ---------------------------------------------------------------------------------- the whole layer


class RouterTensors:
    """weight [E, d]; bias [E], added to the logits; selection_bias [E], added for the selection
    only. No tuple or dataclass: FSDP's mixed precision casts what it finds in those."""

    def __init__(self, weight: Tensor, bias: Tensor | None, selection_bias: Tensor | None) -> None:
        self.weight, self.bias, self.selection_bias = weight, bias, selection_bias


def check_layer(x: Tensor, router: RouterTensors, experts: Experts, seed: Tensor | None) -> int:
    """E, where all these tensors may be those of one layer."""
    w1, w2, b1, b2 = experts
    check_tensors(
        "moe_layer", x=x, router_weight=router.weight, w1=w1, w2=w2, router_bias=router.bias,
        b1=b1, b2=b2, selection_bias=router.selection_bias, seed=seed,
    )  # fmt: skip
    num_experts = w1.shape[0]
    if num_experts == 0:
        refuse("moe_layer", "w1", "at least one expert", f"shape {list(w1.shape)}")
    check_shape("moe_layer", "router_weight", router.weight, num_experts, x.shape[-1])
    check_shape("moe_layer", "router_bias", router.bias, num_experts)
    check_shape("moe_layer", "selection_bias", router.selection_bias, num_experts)
    return num_experts


def run_layer(
    x: Tensor,
    router: RouterTensors,
    experts: Experts,
    options: Packed,
    seed_tensor: Tensor | None,
    main_grad: bool,
) -> LayerOutput:
    """On what check_layer took."""
    operation = "moe_layer"
    if main_grad:
        check_main_grad(x)
    x = rows_of(operation, "x", x)
    x, w1, w2, b1, b2 = autocast(operation, x, *experts)
    weight, bias = router.weight, router.bias
    check_dtype(operation, "router_weight", weight, x.dtype, torch.float32)
    check_dtype(operation, "router_bias", bias, weight.dtype, torch.float32)
    save = needs_backward(x, weight, bias, w1, w2, b1, b2)
    inputs = (
        x, weight, bias, w1, b1, w2, b2, constant(router.selection_bias), seed_tensor,
        *options, save,
    )  # fmt: skip
    if main_grad and save:
        return LayerOutput(*MainGradLayer.call(*inputs))
    return LayerOutput(*run(ops.moe_layer_forward, *inputs))


def layer_output(
    x: Tensor,
    router_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    router_bias: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    selection_bias: Tensor | None = None,
    seed: int | Tensor = 0,
    main_grad: bool = False,
    **options: Unpack[LayerKeywords],
) -> LayerOutput:
    """moe_layer with everything it computes."""
    operation = "moe_layer"
    router = RouterTensors(router_weight, router_bias, selection_bias)
    experts = (w1, w2, b1, b2)
    num_experts = check_layer(x, router, experts, tensor_or_none(seed))
    number, seed_tensor = seed_of(operation, seed)
    biased = selection_bias is not None
    packed = packed_layer(operation, num_experts, biased, top_k=top_k, seed=number, **options)
    FLAG.check(operation, "main_grad", main_grad)
    return run_layer(x, router, experts, packed, seed_tensor, main_grad)


@with_keywords(RoundingOptions, RouterOptions, ExpertOptions, router="topk")
def moe_layer(
    x: Tensor,
    router_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    router_bias: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    selection_bias: Tensor | None = None,
    seed: int | Tensor = 0,
    main_grad: bool = False,
    rows_dropped: Tensor | None = None,
    **options: Unpack[LayerKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Router GEMM, routing and experts as one autograd node.

    Returns (y [..., d], logits [..., E] float32, rows_per_expert [E] int32); gradients flow from y
    and from the logits (auxiliary losses). rows_per_expert counts token choice, before any
    rounding: what `load_balancing_loss` and `update_expert_bias_` take.

    router_weight [E, d] and router_bias [E], of the dtype of x or float32; w1, w2, b1, b2 as in
    `moe`; selection_bias as in `route`; router "topk" | "token_rounding", the latter with tile,
    policy, seed as in `round_tokens`; main_grad as in `MoE`; max_rows, rows_dropped and
    zero_absent_tokens as in `moe` (x's gradient is whole: every token has the router's part).
    """
    if rows_dropped is not None:
        check_tensors("moe_layer", x=x, rows_dropped=rows_dropped)
        check_shape("moe_layer", "rows_dropped", rows_dropped, 1)
    out = layer_output(
        x, router_weight, w1, w2, top_k, router_bias=router_bias, b1=b1, b2=b2,
        selection_bias=selection_bias, seed=seed, main_grad=main_grad, **options,
    )  # fmt: skip
    _count(rows_dropped, out.rows_dropped)
    return out.y, out.logits, out.rows_per_expert_before
