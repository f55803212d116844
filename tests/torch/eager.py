"""The definition of the layer (docs/design/algorithm.md) in plain PyTorch, in its input's dtype.

Loops over rows and experts: the tests hand it float64 and small shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(name: str, layout: str, h: Tensor, limit: float = 7.0) -> Tensor:
    ungated = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu_squared": lambda v: F.relu(v).square(),
    }
    if name in ungated:
        return ungated[name](h)
    gate, up = h.chunk(2, -1) if layout == "concatenated" else (h[..., ::2], h[..., 1::2])
    if name == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    outer = {
        "swiglu": F.silu,
        "geglu": F.gelu,
        "geglu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "reglu": F.relu,
    }
    return outer[name](gate) * up


def expert(x, w1, w2, b1, b2, e, name, layout, limit):
    h = x @ w1[e].T + (0 if b1 is None else b1[e])
    return activate(name, layout, h, limit) @ w2[e].T + (0 if b2 is None else b2[e])


def pairs(
    x, w1, w2, tokens, experts, weights, b1=None, b2=None,
    activation="swiglu", gate_up_layout="concatenated", limit=7.0,
):  # fmt: skip
    """out[t] = sum of weights[p] * expert_p(x[t]); pairs that name nothing are left out."""
    out = torch.zeros_like(x)
    legal = (tokens >= 0) & (tokens < x.shape[0]) & (experts >= 0) & (experts < w1.shape[0])
    for e in range(w1.shape[0]):
        rows = torch.where(legal & (experts == e))[0]
        t = tokens[rows].long()
        y = expert(x[t], w1, w2, b1, b2, e, activation, gate_up_layout, limit)
        out = out.index_add(0, t, weights[rows, None] * y)
    return out


def top_k(x, w1, w2, ids, weights, **options):
    tokens = torch.arange(x.shape[0]).repeat_interleave(ids.shape[1])
    return pairs(x, w1, w2, tokens, ids.flatten(), weights.flatten(), **options)


# Scores that are not divided by their sum over the experts, as a softmax is.
STANDING_ALONE = {"sigmoid_topk": torch.sigmoid}


def scores(logits, scoring):
    if scoring in STANDING_ALONE:
        return STANDING_ALONE[scoring](logits)
    return logits.softmax(-1)


def route(
    logits, k, scoring="softmax_topk", renormalize=None, selection_bias=None, num_groups=1,
    top_groups=1, scale=1.0,
):  # fmt: skip
    score = scores(logits, scoring)
    choice = score if selection_bias is None else score + selection_bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1)[0].sum(-1).topk(top_groups, -1)[1]
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    ids = choice.topk(k, -1)[1]
    weights = score.gather(-1, ids)
    always, alone = scoring == "topk_softmax", scoring in STANDING_ALONE
    if always or (alone if renormalize is None else renormalize):
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if alone else 0))
    return ids, scale * weights


def pair_weights(logits, ids, tokens, experts, k_scoring, renormalized):
    """Weight of any pair, on the scale of its token's own top-K."""
    score = scores(logits, k_scoring)
    value = score[tokens.long(), experts.long()]
    if renormalized:
        value = value / score.gather(-1, ids)[tokens.long()].sum(-1)
    return value


def load_balancing_loss(logits, rows, k, scoring):
    score = scores(logits, scoring)
    share = score / score.sum(-1, keepdim=True)
    return logits.shape[1] * (rows / (logits.shape[0] * k) * share.mean(0)).sum()
