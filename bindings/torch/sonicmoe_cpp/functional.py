"""The functional API. Symbols: T tokens, d hidden size, n intermediate size, E experts, K top_k,
P routed pairs, g = 2 for a gated activation, else 1. Formulas: docs/."""

import torch
from torch import Tensor

from . import _moe, _router  # noqa: F401  (register fakes and autograd)
from ._library import (
    ACTIVATIONS,
    FORM_PAIRS,
    FORM_SORTED,
    FORM_TOP_K,
    GATE_UP_LAYOUTS,
    POLICIES,
    SCORINGS,
    code,
    ops,
    run,
)
from ._moe_layer import LayerOutput, MainGradLayer

# ----------------------------------------------------------------------------------------- helpers


def _autocast(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """Under autocast: x and the experts' parameters in the autocast dtype, as for linear."""
    tensors = [x, *weights]
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def _rows(x: Tensor, argument: str) -> Tensor:
    """[..., d] as [rows, d] with unit stride in d; a view wherever there is one."""
    if x.dim() < 1:
        raise ValueError(f"{argument}: expected [..., size], got a scalar")
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _ranked(tensor: Tensor, argument: str, rank: int) -> Tensor:
    if tensor.dim() != rank:
        raise ValueError(f"{argument}: expected {rank} dimensions, got {list(tensor.shape)}")
    return tensor.contiguous()


def _save_for_backward(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    routing: tuple[int, Tensor, Tensor | None, Tensor | None],
    activation: str,
    gate_up_layout: str,
    limit: float,
    deterministic: bool,
    workspace_limit: int | None,
) -> Tensor:
    form, ids, token_ids, weights = routing
    options = (
        code(ACTIVATIONS, "activation", activation),
        code(GATE_UP_LAYOUTS, "gate_up_layout", gate_up_layout),
        limit,
        deterministic,
        workspace_limit,
    )
    shape = x.shape
    x, w1, w2, b1, b2 = _autocast(_rows(x, "x"), w1, w2, b1, b2)
    save = _save_for_backward(x, w1, w2, b1, b2, weights)
    y, _, _ = run(ops.moe_forward, x, w1, b1, w2, b2, form, ids, token_ids, weights, *options, save)
    return y.reshape(shape)


def _router_options(
    top_k: int,
    scoring: str,
    renormalize: bool | None,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple:
    return (
        top_k,
        code(SCORINGS, "scoring", scoring),
        renormalize,
        num_groups,
        top_groups,
        scale,
    )


def _seed(seed: int | Tensor) -> tuple[int, Tensor | None]:
    """An int stays in the call; a tensor (int64, one element) is read when the operator runs."""
    if isinstance(seed, Tensor):
        return 0, seed.reshape(1)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 .. 2**63 - 1 or an int64 tensor, got {seed}")
    return seed, None


def _logits(logits: Tensor) -> Tensor:
    """[..., E] as float32 [T, E], contiguous."""
    return _rows(logits, "logits").float().contiguous()


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
    An id < 0 or >= E is a dropped slot: it contributes 0 and its weight's gradient is 0.
    Gradients: x, w1, w2, b1, b2, topk_weights. Kept for backward: P*g*n elements of H and the
    routing metadata, nothing of size P*d.

    deterministic=False lets the GPU add a token's rows to y and to x's gradient in any order, each
    sum rounded to bfloat16: faster and with less scratch, but the last bits change from run to run.
    """
    ids = _rows(topk_ids, "topk_ids").contiguous()
    weights = _rows(topk_weights, "topk_weights").contiguous()
    routing = (FORM_TOP_K, ids, None, weights)
    options = (activation, gate_up_layout, limit, deterministic, workspace_limit)
    return _experts(x, w1, w2, b1, b2, routing, *options)


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
    rows = _ranked(rows, "rows", 2)
    weights = None if row_weights is None else _ranked(row_weights, "row_weights", 1)
    routing = (FORM_SORTED, _ranked(offsets, "offsets", 1), None, weights)
    return _experts(
        rows,
        w1,
        w2,
        b1,
        b2,
        routing,
        activation,
        gate_up_layout,
        limit,
        deterministic=True,  # there is no sum
        workspace_limit=workspace_limit,
    )


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
    routing = (
        FORM_PAIRS,
        _ranked(expert_ids, "expert_ids", 1),
        _ranked(token_ids, "token_ids", 1),
        _ranked(pair_weights, "pair_weights", 1),
    )
    options = (activation, gate_up_layout, limit, deterministic, workspace_limit)
    return _experts(x, w1, w2, b1, b2, routing, *options)


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
    options = _router_options(top_k, scoring, renormalize, num_groups, top_groups, scale)
    ids, weights = run(ops.route_forward, _logits(logits), bias, *options)
    shape = (*logits.shape[:-1], top_k)
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
    number, tensor = _seed(seed)
    options = _router_options(top_k, scoring, renormalize, num_groups, top_groups, scale)
    token_ids, expert_ids, pair_weights, *_ = run(
        ops.round_tokens_forward,
        _logits(logits),
        bias,
        tensor,
        *options,
        tile,
        code(POLICIES, "policy", policy),
        number,
    )
    return token_ids, expert_ids, pair_weights


def load_balancing_loss(
    logits: Tensor,
    rows_per_expert: Tensor,
    top_k: int,
    scoring: str = "softmax_topk",
) -> Tensor:
    """Switch auxiliary loss E * sum_e f_e p_e (a scalar), f_e = rows_per_expert[e] / (T*K).

    Uniform routing gives 1. Hugging Face's value is top_k times this.
    """
    loss = run(
        ops.load_balancing_loss_forward,
        _logits(logits),
        rows_per_expert,
        top_k,
        code(SCORINGS, "scoring", scoring),
    )
    return loss.reshape(())


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over the tokens of logsumexp(logits)^2 (a scalar)."""
    return run(ops.router_z_loss_forward, _logits(logits)).reshape(())


def update_expert_bias_(bias: Tensor, rows_per_expert: Tensor, rate: float) -> Tensor:
    """In place: bias[e] += rate * sign(mean(rows) - rows[e]). Returns bias."""
    ops.update_expert_bias_(bias, rows_per_expert, rate)
    return bias


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
    """moe_layer with everything it computes; x is [T, d] here."""
    if router not in ("topk", "token_rounding"):
        raise ValueError(f"router: expected one of topk, token_rounding, got {router!r}")
    if main_grad and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        raise ValueError("main_grad: not supported under autocast (parameters would be copies)")
    number, tensor = _seed(seed)
    x, w1, w2, b1, b2 = _autocast(_rows(x, "x"), w1, w2, b1, b2)
    if router_w.dtype not in (x.dtype, torch.float32):
        router_w = router_w.to(x.dtype)
    inputs = (
        x, router_w, router_b, w1, b1, w2, b2, bias, tensor,
        code(ACTIVATIONS, "activation", activation),
        code(GATE_UP_LAYOUTS, "gate_up_layout", gate_up_layout),
        limit,
        deterministic,
        *_router_options(top_k, scoring, renormalize, num_groups, top_groups, scale),
        router == "token_rounding", tile, code(POLICIES, "policy", policy), workspace_limit,
        number, _save_for_backward(x, router_w, router_b, w1, w2, b1, b2),
    )  # fmt: skip
    if main_grad and inputs[-1]:
        return LayerOutput(*MainGradLayer.apply(*inputs))
    return LayerOutput(*run(ops.moe_layer_forward, *inputs))


def moe_layer(
    x: Tensor, router_w: Tensor, w1: Tensor, w2: Tensor, top_k: int, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Router GEMM, routing and experts as one autograd node.

    Returns (y [..., d], logits [..., E] float32, rows_per_expert [E] int32); gradients flow from y
    and from the logits (auxiliary losses). router_w [E, d], of the dtype of x or float32.

    Options (keyword only): router_b [E]; b1, b2; router "topk" | "token_rounding" with tile,
    policy, seed; scoring, renormalize, bias, num_groups, top_groups, scale as in `route`;
    activation, gate_up_layout, limit, workspace_limit, deterministic as in `moe`.
    """
    out = run_layer(_rows(x, "x"), router_w, w1, w2, top_k, **options)
    logits = out.logits.reshape(*x.shape[:-1], out.logits.shape[-1])
    return out.y.reshape(x.shape), logits, out.rows_per_expert
