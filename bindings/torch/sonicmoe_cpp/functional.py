"""The functional API. Symbols: T tokens, d hidden size, n intermediate size, E experts, K top_k,
P routed pairs, g = 2 for a gated activation, else 1. Formulas: docs/.

A wrong option is a ValueError, a wrong tensor a RuntimeError, each of the form `operation:
argument: expected X, got Y` and raised before anything is computed.
"""

import torch
from torch import Tensor

from . import _moe, _router  # noqa: F401  (register fakes and autograd)
from ._checks import check_dtype, check_leading, check_tensors, refuse
from ._library import FORM_PAIRS, FORM_SORTED, FORM_TOP_K, ops, run
from ._moe_layer import LayerOutput, MainGradLayer
from ._options import (
    expert_options,
    flag,
    loss_options,
    number,
    rounding_options,
    router_kind,
    router_options,
    seed_number,
)

# ----------------------------------------------------------------------------------------- helpers


def _autocast(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """Under autocast: x and the experts' parameters in the autocast dtype, as for linear."""
    tensors = [x, *weights]
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def _rows(operation: str, argument: str, x: Tensor) -> Tensor:
    """[..., d] as [rows, d] with unit stride in d; a view wherever there is one."""
    if x.shape[-1] == 0:
        refuse(operation, argument, "a last dimension of at least 1", f"shape {list(x.shape)}")
    if x.dim() != 2:
        x = _flat(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _save_for_backward(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _experts(
    operation: str, argument: str, x: Tensor, weights: tuple, routing: tuple, options: tuple
) -> Tensor:
    """`weights` w1, w2, b1, b2 and what `routing` holds are checked; x, of the name `argument`, is
    [T, d] here."""
    form, ids, token_ids, row_weights = routing
    x, w1, w2, b1, b2 = _autocast(x, *weights)
    _check_computable(operation, argument, x)
    save = _save_for_backward(x, w1, w2, b1, b2, row_weights)
    y, _, _ = run(
        ops.moe_forward, x, w1, b1, w2, b2, form, ids, token_ids, row_weights, *options, save
    )
    return y


def _check_computable(operation: str, argument: str, x: Tensor) -> None:
    """Autocast may have asked for float16."""
    check_dtype(operation, argument, x, torch.float32, torch.bfloat16)


def _seed(operation: str, seed: int | Tensor) -> tuple[int, Tensor | None]:
    """An int stays in the call; a tensor (int64, one element) is read when the operator runs."""
    if not isinstance(seed, Tensor):
        return seed_number(operation, seed), None
    if seed.numel() != 1:
        refuse(operation, "seed", "an int64 tensor of one element", f"shape {list(seed.shape)}")
    return 0, seed.reshape(1)


def _logits(operation: str, logits: Tensor) -> Tensor:
    """[..., E] as float32 [T, E], contiguous."""
    return _rows(operation, "logits", logits).float().contiguous()


# ----------------------------------------------------------------------------------------- experts


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
    ids, weights = _flat(topk_ids).contiguous(), _flat(topk_weights).contiguous()
    routing = (FORM_TOP_K, ids, None, weights)
    y = _experts("moe", "x", _rows("moe", "x", x), (w1, w2, b1, b2), routing, options)
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
    x = _rows("moe_sorted", "rows", rows)
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
    y = _experts("moe_pairs", "x", _rows("moe_pairs", "x", x), (w1, w2, b1, b2), routing, options)
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
    rows = _logits("route", logits)
    options = router_options(
        "route", rows.shape[1], top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    ids, weights = run(ops.route_forward, rows, _constant(bias), *options)
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
    number_, tensor = _seed("round_tokens", seed)
    check_tensors("round_tokens", logits=logits, bias=bias, seed=tensor)
    rows = _logits("round_tokens", logits)
    options = router_options(
        "round_tokens", rows.shape[1], top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    rounding = rounding_options("round_tokens", tile, policy)
    token_ids, expert_ids, pair_weights, *_ = run(
        ops.round_tokens_forward, rows, _constant(bias), tensor, *options, *rounding, number_
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
    rows = _logits(operation, logits)
    options = loss_options(operation, rows.shape[1], top_k, scoring)
    loss = run(ops.load_balancing_loss_forward, rows, rows_per_expert.contiguous(), *options)
    return loss.reshape(())


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over the tokens of logsumexp(logits)^2 (a scalar)."""
    check_tensors("router_z_loss", logits=logits)
    return run(ops.router_z_loss_forward, _logits("router_z_loss", logits)).reshape(())


def update_expert_bias_(bias: Tensor, rows_per_expert: Tensor, rate: float) -> Tensor:
    """In place: bias[e] += rate * sign(mean(rows) - rows[e]). Returns bias.

    bias [E] float32, contiguous, without requires_grad (or under torch.no_grad()); rows_per_expert
    [E] int32 counts token choice.
    """
    operation = "update_expert_bias_"
    if bias is None:
        refuse(operation, "bias", "a tensor", "None")
    check_tensors(operation, bias=bias, rows_per_expert=rows_per_expert)
    if bias.is_neg():
        refuse(operation, "bias", "a tensor to write into", "a view with the negative bit")
    rate = number(operation, "rate", rate)
    ops.update_expert_bias_(bias, rows_per_expert.contiguous(), rate)
    return bias


def _name_of(bias: Tensor | None) -> str | None:
    return None if bias is None else "bias"


def _constant(bias: Tensor | None) -> Tensor | None:
    """A selection bias has no gradient, even where it is a Parameter."""
    return bias.detach() if bias is not None and bias.requires_grad else bias


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
    number_, tensor = _seed("moe_layer", seed)
    check_tensors(
        "moe_layer", x=x, router_w=router_w, w1=w1, w2=w2, router_b=router_b, b1=b1, b2=b2,
        bias=bias, seed=tensor,
    )  # fmt: skip
    experts = expert_options(
        "moe_layer", activation, gate_up_layout, limit, deterministic, workspace_limit
    )
    routing = router_options(
        "moe_layer", w1.shape[0], top_k, scoring, renormalize, _name_of(bias), num_groups,
        top_groups, scale,
    )  # fmt: skip
    rounds = router_kind("moe_layer", router)
    rounding = rounding_options("moe_layer", tile, policy)
    if flag("moe_layer", "main_grad", main_grad):
        _check_main_grad(x)

    x, w1, w2, b1, b2 = _autocast(_rows("moe_layer", "x", x), w1, w2, b1, b2)
    _check_computable("moe_layer", "x", x)
    check_dtype("moe_layer", "router_w", router_w, x.dtype, torch.float32)
    if router_b is not None:
        check_dtype("moe_layer", "router_b", router_b, router_w.dtype, torch.float32)
    save = _save_for_backward(x, router_w, router_b, w1, w2, b1, b2)
    *activation_options, workspace_limit = experts
    inputs = (
        x, router_w, router_b, w1, b1, w2, b2, _constant(bias), tensor, *activation_options,
        *routing, rounds, *rounding, workspace_limit, number_, save,
    )  # fmt: skip
    if main_grad and save:
        return LayerOutput(*MainGradLayer.apply(*inputs))
    return LayerOutput(*run(ops.moe_layer_forward, *inputs))


def _check_main_grad(x: Tensor) -> None:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        raise ValueError("main_grad: not supported under autocast (parameters would be copies)")
    if torch._C._are_functorch_transforms_active():
        raise ValueError("main_grad: not supported under torch.func (it is a side effect)")


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
