"""A replaced MoE block: one fused layer where router and experts are plain, else their calls."""

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..._rules import Integer
from ...functional import layer_output, round_tokens
from ...module import advance_seed, fills_a_tile
from ...options import check_rounding as check_rounding_options
from .activations import expert_options
from .experts import BACKEND, expert_weights, register
from .families import (
    ADVICE,
    FAMILIES,
    Family,
    check_block,
    check_rounding,
    family_of,
    innermost,
    selection_bias,
)
from .plain import accelerate_wraps, all_plain, has_own_forward, why_called


class SonicMoEBlock:
    """What `replace_moe_blocks` mixes into the class of a sparse MoE block.

    The block stays the very object it was: children, parameters, hooks and place in the model. Its
    forward is one autograd node (`moe_layer`) wherever router and experts are plain at that moment.
    Where anything acts on their calls (hooks, adapters, offloading, sharding, wrappers), the block
    calls its router and its experts, as the stock block does; the experts run on the backend.

    After a forward: `last_rows_per_expert` [E] int32, rows computed, and
    `last_rows_per_expert_before`, what token choice asked for.
    """

    _family: Family
    _stock: Any  # the class before the replacement
    router_kind: str
    tile: int
    policy: str
    seed: int
    training: bool  # this and the experts of the stock class
    experts: Any
    last_rows_per_expert: Tensor | None = None
    _last_topk_ids: Tensor | None = None

    @property
    def last_rows_per_expert_before(self) -> Tensor | None:
        if self._last_topk_ids is None or self.last_rows_per_expert is None:
            return self.last_rows_per_expert
        return _count(self._last_topk_ids, self.last_rows_per_expert.numel())

    def why_called(self) -> str | None:
        """Why the next forward would call router and experts; None where it is the fused layer."""
        family = self._family
        router, experts = getattr(self, family.router_name), self.experts
        forward = family.own(family.router_forward)
        reason = why_called(router, family.router, forward, observers=True)
        if reason is not None:
            return f"{family.router_name}: {reason}"
        reason = why_called(experts, family.experts, family.own(family.experts_forward))
        if reason is not None:
            return f"experts: {reason}"
        weights = expert_weights(experts)
        tensors = (router.weight, getattr(router, "bias", None), weights["w1"], weights["w2"])
        plain = all_plain((*tensors, weights["b1"], weights["b2"]))
        return None if plain else "a parameter is no plain tensor"

    def forward(self, hidden_states: Tensor) -> Any:
        family = self._family
        if self._stock.forward is not family.block_forward:
            raise ValueError(
                f"{self._stock.__name__}.forward: expected the one that was replaced, got a patch "
                "of a later time: patch before replace_moe_blocks"
            )
        noise = getattr(self, "jitter_noise", 0.0)
        if self.training and noise > 0:
            low, high = 1.0 - noise, 1.0 + noise
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        rounds = self.training and self.router_kind == "token_rounding"
        rounds = rounds and fills_a_tile(hidden_states, self.tile)
        if self.why_called() is None:
            y, scores = self._fused(hidden_states, rounds)
        elif rounds:
            y, scores = self._rounded_by_calls(hidden_states)
        else:
            y, scores = self._by_calls(hidden_states)
        y = y.to(hidden_states.dtype).reshape(hidden_states.shape)
        if hasattr(self, "shared_experts"):
            y = y + self.shared_experts(hidden_states)
        return (y, scores) if family.returns_scores else y

    def _fused(self, hidden_states: Tensor, rounds: bool) -> tuple[Tensor, Tensor]:
        router = getattr(self, self._family.router_name)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = expert_weights(self.experts)
        out = layer_output(
            x.to(weights["w1"].dtype),
            router.weight,
            top_k=router.top_k,
            router_bias=getattr(router, "bias", None),
            selection_bias=selection_bias(router),
            router="token_rounding" if rounds else "topk",
            tile=self.tile,
            policy=self.policy,
            seed=self._next_seed(x.device) if rounds else 0,
            **weights,
            **self._family.router_options(router),
            **expert_options(self.experts, f"{self._stock.__name__}.experts"),
        )
        for hook in router._forward_hooks.values():  # observers alone, see why_called
            if hook(router, (x,), (out.logits, None, None)) is not None:
                raise ValueError(f"{hook}: expected None from an observer(), got another result")
        self.last_rows_per_expert = out.rows_per_expert
        self._last_topk_ids = out.topk_ids if rounds else None
        return out.y, out.routing_weights

    def _call_router(self, hidden_states: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router = getattr(self, self._family.router_name)
        return router(x if self._family.flat_router_input else hidden_states)

    def _by_calls(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, scores, ids = self._call_router(hidden_states, x)
        y = self.experts(x, ids, scores)
        self.last_rows_per_expert = _count(ids, logits.shape[-1])
        self._last_topk_ids = None
        return y, scores

    def _rounded_by_calls(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Every pair is a row with one expert, since experts are called with ids [rows, K]."""
        family = self._family
        router = getattr(self, family.router_name)
        check_rounding(router, family, f"{self._stock.__name__}.{family.router_name}")
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, _, ids = self._call_router(hidden_states, x)
        tokens, experts, weights = round_tokens(
            logits,
            router.top_k,
            tile=self.tile,
            policy=self.policy,
            seed=self._next_seed(x.device),
            selection_bias=selection_bias(router),
            **family.router_options(router),
        )
        num_experts = logits.shape[-1]
        self.last_rows_per_expert = _count(experts, num_experts)
        self._last_topk_ids = ids
        if getattr(innermost(self.experts, family.experts), "exchange", None) is not None:
            return self.experts(x, experts, weights, token_ids=tokens), weights
        # Unused places of the list hold -1, which not every experts implementation takes: they
        # become token 0 at expert 0 with weight 0.
        used = (experts >= 0) & (tokens >= 0)
        weights = torch.where(used, weights, 0.0)
        tokens = torch.where(used, tokens, 0).long()
        experts = torch.where(used, experts, 0).long()
        rows = self.experts(x[tokens], experts[:, None], weights[:, None])
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return y.index_add(0, tokens, rows.float()), weights

    def _next_seed(self, device: torch.device) -> int | Tensor:
        if self.policy != "stochastic":
            return 0
        return advance_seed(torch.empty(1, dtype=torch.int64, device=device), self.seed)

    def extra_repr(self) -> str:
        rounding = f", tile={self.tile}, policy={self.policy}" if self.router_kind != "topk" else ""
        return f"sonicmoe_cpp: router={self.router_kind}{rounding}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls: type = _block_class(self._stock, self._family)
        if type(self) is not cls:  # fully_shard's, for one
            return super().__reduce_ex__(protocol)
        return _new_block, (self._stock,), self.__dict__


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert stands in ids, [E] int32; what names no expert is not counted. Unlike
    bincount this never waits for the GPU."""
    ids = ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.index_add(0, ids, torch.ones_like(ids, dtype=torch.int32))[:num_experts]


@functools.cache
def _block_class(stock: Any, family: Family) -> Any:
    """One class for all blocks of a kind, so that torch.compile compiles one layer, not each. It
    keeps the stock class's name, by which wrapping policies and leaf modules are chosen."""
    members = {"__module__": stock.__module__, "_family": family, "_stock": stock}
    return type(stock.__name__, (SonicMoEBlock, stock), members)


def _new_block(stock: Any) -> Any:
    """An empty block, for copy and pickle."""
    register()
    family = next(family for family in FAMILIES if issubclass(stock, family.block))
    cls = _block_class(stock, family)
    return cls.__new__(cls)


def stock_class(block: nn.Module) -> type[nn.Module]:
    return block._stock if isinstance(block, SonicMoEBlock) else type(block)


def _check_own_forward(block: nn.Module, path: str) -> None:
    """A forward on the instance would run in place of the replacement's."""
    cls = type(block)
    if isinstance(block, SonicMoEBlock) or not has_own_forward(block, cls.forward):
        return
    if not accelerate_wraps(block, cls.forward):
        raise ValueError(
            f"{path}.forward: expected the forward of {cls.__name__}, got another function set on "
            f"the instance: set it after replace_moe_blocks, or {ADVICE}"
        )


def _swap(block: Any, family: Family, configs: dict[int, tuple]) -> None:
    """Makes block, already checked, a SonicMoEBlock whose experts run on the backend when called.
    configs: every configuration with its copy, by the id of the first."""
    cls: Any = type(block)
    experts = innermost(block.experts, family.experts)
    # The experts' own copy: the model's configuration goes on saying what the user asked for.
    if id(experts.config) not in configs:
        configs[id(experts.config)] = (experts.config, copy.copy(experts.config))
    experts.config = configs[id(experts.config)][1]
    experts.config._experts_implementation = BACKEND
    if isinstance(block, SonicMoEBlock):
        return
    block.__class__ = _block_class(cls, family)
    if "forward" not in block.__dict__:
        return
    if accelerate_wraps(block, cls.forward):  # accelerate's wrapper calls what it keeps here
        block._old_forward = types.MethodType(type(block).forward, block)
    else:
        del block.forward  # cls.forward itself, left behind


def replace_moe_blocks(
    model: nn.Module,
    router: str = "topk",
    tile: int = 128,
    policy: str = "nearest",
    seed: int = 0,
) -> int:
    """Replaces every sparse MoE block of a supported family in place; returns how many.

    router "token_rounding" rounds in training and is plain top-K in eval(), and for a batch of
    fewer tokens than one tile; `seed` is that of the policy `stochastic`, other for every block.
    Blocks that were replaced before get the new options. ValueError, with the block's place in the
    model and the model left as it was: an option, no block at all, or a block that the library
    cannot compute.
    """
    rounding = check_rounding_options("replace_moe_blocks", router, tile=tile, policy=policy)
    Integer(0, 2**62 - 1).check("replace_moe_blocks", "seed", seed)  # each block adds its index
    modules: Any = ((path, module, family_of(module)) for path, module in model.named_modules())
    found = [each for each in modules if each[-1] is not None]
    if not found:
        known = ", ".join(family.block.__name__ for family in FAMILIES)
        raise ValueError(
            f"replace_moe_blocks: {type(model).__name__} has no block of {known}; experts of other "
            "models run with model.set_experts_implementation('sonicmoe_cpp') after register()"
        )
    for path, block, family in found:
        path = f"replace_moe_blocks: {path or type(block).__name__}"
        check_block(block, stock_class(block), family, path, rounding is not None)
        _check_own_forward(block, path)
    register()
    configs: dict[int, tuple] = {}
    for index, (_, block, family) in enumerate(found):
        _swap(block, family, configs)
        block.router_kind, block.tile, block.policy = router, tile, policy
        block.seed = seed + index
    return len(found)
