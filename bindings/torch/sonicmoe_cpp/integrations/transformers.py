"""Hugging Face transformers (5.7 or later).

`register()` makes `experts_implementation="sonicmoe_cpp"` available: the experts of any model run
here, its own router stays. `replace_moe_blocks(model)` swaps whole sparse MoE blocks of Qwen3-MoE,
OLMoE, Mixtral, gpt-oss and DeepSeek-V3 for `SonicMoEBlock`, router included, with token rounding
if asked. Parameters and their names stay the model's own, so checkpoints load in stock transformers.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ..functional import moe, run_layer
from ..module import advance_seed

# Class names of transformers' activation modules; the gated form multiplies by the up projection.
_GATED = {
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELU": "geglu",
    "GELUActivation": "geglu",
    "GELUTanh": "geglu_tanh",
    "NewGELUActivation": "geglu_tanh",
    "ReLU": "reglu",
}
_UNGATED = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
}
# alpha of gpt-oss in (up + 1) * gate * sigmoid(alpha * gate); the library knows no other.
_CLAMPED_ALPHA = 1.702


def _expert_options(experts: nn.Module) -> dict:
    """activation, gate_up_layout, limit of an Experts module; refuses what it does not know."""
    name = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"sonicmoe_cpp: {name} normalises each expert's output: not supported")
    if type(experts)._apply_gate is not _default_apply_gate and experts.has_gate:
        if name == "GptOssExperts" and experts.alpha == _CLAMPED_ALPHA:
            return {
                "activation": "swiglu_clamped",
                "gate_up_layout": "interleaved",
                "limit": float(experts.limit),
            }
        raise ValueError(f"sonicmoe_cpp: {name} has a gate of its own (_apply_gate): not supported")
    if experts.has_gate and not experts.is_concatenated:
        raise ValueError(f"sonicmoe_cpp: {name} is interleaved but its gate splits halves")
    known = _GATED if experts.has_gate else _UNGATED
    activation = type(experts.act_fn).__name__
    if activation not in known:
        raise ValueError(f"sonicmoe_cpp: {name} uses the activation {activation}: not supported")
    return {"activation": known[activation], "gate_up_layout": "concatenated"}


def _expert_weights(experts: nn.Module) -> dict[str, Tensor | None]:
    """w1, w2, b1, b2 as views of the module's parameters."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, up), experts.down_proj
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    b1 = getattr(experts, f"{up}_bias") if experts.has_bias else None
    b2 = experts.down_proj_bias if experts.has_bias else None
    return {"w1": w1, "w2": w2, "b1": b1, "b2": b2}


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts backend: ids of num_experts and more (expert parallelism) are dropped slots."""
    weights = _expert_weights(self)
    x = hidden_states.to(weights["w1"].dtype)
    if top_k_weights.dtype not in (torch.float32, torch.bfloat16):
        top_k_weights = top_k_weights.float()
    y = moe(
        x,
        topk_ids=top_k_index,
        topk_weights=top_k_weights,
        **weights,
        **_expert_options(self),
    )
    return y.to(hidden_states.dtype)


def register(name: str = "sonicmoe_cpp") -> None:
    """Registers `name` for `from_pretrained(..., experts_implementation=name)` and
    `model.set_experts_implementation(name)`."""
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


# -------------------------------------------------------------------------------------- whole blocks


@dataclass(frozen=True)
class _Family:
    router: str  # name of the router's submodule
    scoring: str
    renormalize: bool | None = None  # None: the router module says (norm_topk_prob)
    returns_scores: bool = False  # the block returns (hidden_states, router scores)


_FAMILIES = {
    "Qwen3MoeSparseMoeBlock": _Family("gate", "softmax_topk"),
    "OlmoeSparseMoeBlock": _Family("gate", "softmax_topk"),
    "MixtralSparseMoeBlock": _Family("gate", "softmax_topk", renormalize=True),
    "GptOssMLP": _Family("router", "topk_softmax", renormalize=True, returns_scores=True),
    "DeepseekV3MoE": _Family("gate", "sigmoid_topk"),
}


class _PublishesLogits:
    """Mixed into the model's router class: the block computes the logits and hands them over, so
    that hooks on the router (output_router_logits) see them. Called alone it is the model's own."""

    def forward(self, hidden_states: Tensor, logits: Tensor | None = None):
        if logits is None:
            return super().forward(hidden_states)
        return logits, None, None

    def __reduce__(self):
        return _new_router, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _router_class(stock: type[nn.Module]) -> type[nn.Module]:
    """One class for all blocks: another in each would make torch.compile compile each layer anew."""
    return type(stock.__name__, (_PublishesLogits, stock), {"__module__": stock.__module__})


def _new_router(stock: type[nn.Module]) -> nn.Module:
    cls = _router_class(stock)
    return cls.__new__(cls)


class SonicMoEBlock(nn.Module):
    """A sparse MoE block on `moe_layer`, holding the router, experts and shared experts of the
    block it replaces. After a forward: `last_rows_per_expert` [E] int32, rows computed, and
    `last_rows_per_expert_before`, what token choice asked for."""

    def __init__(
        self,
        block: nn.Module,
        family: _Family,
        router: str,
        tile: int,
        policy: str,
        seed: int,
    ) -> None:
        super().__init__()
        # The very children, under their names and in their order.
        for name, child in block.named_children():
            self.add_module(name, child)
        gate = getattr(block, family.router)
        if not isinstance(gate, _PublishesLogits):
            gate.__class__ = _router_class(type(gate))
        self.family = family
        self.router_kind = router
        self.tile = tile
        self.policy = policy
        self.seed = seed
        self.jitter_noise = getattr(block, "jitter_noise", 0.0)
        renormalize = family.renormalize
        if renormalize is None:
            renormalize = bool(gate.norm_topk_prob)
        self.router_options = {
            "scoring": family.scoring,
            "renormalize": renormalize,
            "num_groups": getattr(gate, "num_group", 1),
            "top_groups": getattr(gate, "topk_group", 1),
            "scale": float(getattr(gate, "routed_scaling_factor", 1.0)),
        }
        self.expert_options = _expert_options(block.experts)
        start = torch.tensor([seed], dtype=torch.int64, device=gate.weight.device)
        self.register_buffer("rounding_seed", start, persistent=False)
        self.last_rows_per_expert: Tensor | None = None
        self._last_topk_ids: Tensor | None = None
        self.train(block.training)

    @property
    def last_rows_per_expert_before(self) -> Tensor | None:
        if self._last_topk_ids is None:
            return self.last_rows_per_expert
        num_experts = self.last_rows_per_expert.numel()
        ids = self._last_topk_ids
        # Unlike bincount, histc never waits for the GPU; on the CPU it takes floats only.
        ids = ids if ids.is_cuda else ids.float()
        return torch.histc(ids, num_experts, 0, num_experts - 1).int()

    def forward(self, hidden_states: Tensor):
        shape = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        gate = getattr(self, self.family.router)
        x = hidden_states.reshape(-1, shape[-1])
        weights = _expert_weights(self.experts)
        rounds = self.training and self.router_kind == "token_rounding"
        seed: int | Tensor = 0
        if rounds and self.policy == "stochastic":
            seed = advance_seed(self.rounding_seed, self.seed)
        out = run_layer(
            x.to(weights["w1"].dtype),
            gate.weight,
            top_k=gate.top_k,
            router_b=getattr(gate, "bias", None),
            bias=getattr(gate, "e_score_correction_bias", None),
            router="token_rounding" if rounds else "topk",
            tile=self.tile,
            policy=self.policy,
            seed=seed,
            **weights,
            **self.router_options,
            **self.expert_options,
        )
        gate(x, logits=out.logits)
        self.last_rows_per_expert = out.rows_per_expert
        self._last_topk_ids = out.topk_ids if rounds else None
        y = out.y.to(hidden_states.dtype).reshape(shape)
        if hasattr(self, "shared_experts"):
            y = y + self.shared_experts(hidden_states)
        return (y, out.pair_weights) if self.family.returns_scores else y


def replace_moe_blocks(
    model: nn.Module,
    router: str = "topk",
    tile: int = 128,
    policy: str = "nearest",
    seed: int = 0,
) -> int:
    """Replaces every sparse MoE block of a supported family in place; returns how many.

    router "token_rounding" rounds in training and is plain top-K in eval(); `seed` is that of the
    policy `stochastic`, other for every block. Raises ValueError when there is nothing to replace.
    """
    if router not in ("topk", "token_rounding"):
        raise ValueError(f"router: expected one of topk, token_rounding, got {router!r}")
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in _FAMILIES
    ]
    if not found:
        raise ValueError(
            f"replace_moe_blocks: {type(model).__name__} has no block of {', '.join(_FAMILIES)}"
        )
    for index, (parent, name, block) in enumerate(found):
        family = _FAMILIES[type(block).__name__]
        replacement = SonicMoEBlock(block, family, router, tile, policy, seed + index)
        setattr(parent, name, replacement)
    return len(found)
