"""The modules in place of torchtitan's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from ...distributed import Context
from ...distributed.parallel import Exchange
from ...functional import moe, moe_sorted

DTYPE = torch.bfloat16  # what torchtitan's experts compute in


class FusedExperts(GroupedExperts):
    """w1 and w3 as one parameter w13 [E, F, 2, D], gate and up, so that no call copies them. State
    dicts have torchtitan's names, w1_EFD and w3_EFD; those with w13 load too."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.w1_EFD, self.w3_EFD
        shape = (config.num_experts, config.hidden_dim, 2, config.dim)
        self.w13 = nn.Parameter(torch.empty(shape))
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_merge)

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Rows that a dispatcher has sorted by expert."""
        ends = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        return moe_sorted(x_RD.to(DTYPE), offsets=ends, **self.options()).type_as(x_RD)

    def options(self) -> dict[str, Any]:
        """Weights, those of this rank, and layout as `moe` takes them."""
        w1 = Exchange.local(self.w13).to(DTYPE).flatten(1, 2)
        w2 = Exchange.local(self.w2_EDF).to(DTYPE)
        return {"w1": w1, "w2": w2, "gate_up_layout": "interleaved"}


def _split(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    w13 = state.pop(f"{prefix}w13")
    state[f"{prefix}w1_EFD"] = w13[:, :, 0].contiguous()
    state[f"{prefix}w3_EFD"] = w13[:, :, 1].contiguous()


def _merge(module: nn.Module, state: dict, prefix: str, *unused: Any) -> None:
    halves = [f"{prefix}{name}" for name in ("w1_EFD", "w3_EFD")]
    if all(name in state for name in halves):
        state[f"{prefix}w13"] = torch.stack([state.pop(name) for name in halves], dim=2)


class SonicRoutedExperts(RoutedExperts):
    """Gathers rows and weighs results inside the products. With expert parallelism by torchtitan's
    own all-to-all the exchange is that of `sonicmoe_cpp.distributed`; any other dispatcher
    (DeepEP, HybridEP) keeps its dispatch and its combine around the products."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        row_capacity: float | None = None
        keep_received: bool | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        kinds = (LocalTokenDispatcher, AllToAllTokenDispatcher)
        self.dispatches = type(self.token_dispatcher) not in kinds
        self.exchange: Exchange | None = None

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        if self.dispatches:
            return super().forward(
                x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E
            )
        x, ids, scores = x_BLD.to(DTYPE), topk_expert_ids_BLK, topk_scores_BLK.float()
        options = self.inner_experts.options()
        if self.exchange is None:
            y = moe(x, topk_ids=ids, topk_weights=scores, **options)
        else:
            y = self.exchange.experts(x, ids, scores, **options)
        return y.type_as(x_BLD)

    def parallelize(self, parallel_dims: Any) -> None:
        super().parallelize(parallel_dims)
        mesh = getattr(self.token_dispatcher, "ep_mesh", None)
        if self.dispatches or mesh is None:
            return
        inner = self.config.inner_experts
        context = Context(
            mesh, inner.dim, inner.num_experts, self.token_dispatcher.top_k, dtype=DTYPE
        )
        self.exchange = Exchange(
            context, self.config.row_capacity, self.config.keep_received, "count",
            equal_tokens=True, shared_tokens=False,
        )  # fmt: skip
