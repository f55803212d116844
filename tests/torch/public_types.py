"""What type checkers see of the package. Never run: `make format-check` checks it, and an ignore
that nothing needs is an error, so that every wrong line below has to be found wrong."""

import sonicmoe_cpp as sm
from torch import Tensor, nn
from typing_extensions import assert_type


def right(x: Tensor, ids: Tensor) -> None:
    assert_type(sm.moe(x, x, x, ids, x, activation="geglu", limit=3, workspace_limit=None), Tensor)
    assert_type(sm.moe_sorted(x, x, x, ids, deterministic=False), Tensor)
    assert_type(sm.route(x, 2, scoring="sigmoid_topk", selection_bias=x), tuple[Tensor, Tensor])
    assert_type(sm.round_tokens(x, 2, tile=8, seed=ids), tuple[Tensor, Tensor, Tensor])
    assert_type(sm.moe_layer(x, x, x, x, 2, router="topk"), tuple[Tensor, Tensor, Tensor])
    assert_type(sm.load_balancing_loss(x, ids, 2), Tensor)
    layer = sm.MoE(8, 4, 6, 2, expert_bias=True, policy="balanced", gate_up_layout="interleaved")
    assert_type(layer.options.router.renormalize, bool | None)
    assert_type(layer.experts.b1, nn.Parameter | None)


def wrong(x: Tensor, ids: Tensor) -> None:
    sm.moe(x, x, x, ids, x, activation=3)  # type: ignore[arg-type]
    sm.moe(x, x, x, ids, x, tile=3)  # type: ignore[call-arg]
    sm.moe_pairs(x, x, x, ids, ids, x, None, None, "geglu")  # type: ignore[call-arg,arg-type]
    sm.route(x, 2, bias=x)  # type: ignore[call-arg]
    sm.route(x, 2, renormalize="on")  # type: ignore[arg-type]
    sm.round_tokens(x, 2, seed=0.5)  # type: ignore[arg-type]
    sm.moe_layer(x, x, x, x, 2, workspace_limit=1.5)  # type: ignore[arg-type]
    sm.moe_layer(x, x, x, x, 2, router_w=x)  # type: ignore[call-arg]
    sm.MoE(8, 4, 6, 2, bias=True)  # type: ignore[call-arg]
    sm.MoE(8, 4, 6, 2, limit="7")  # type: ignore[arg-type]
