"""The layer as a module."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ._checks import check_shape, check_tensors
from ._library import gate_factor
from ._main_grad import check_owner
from ._moe_layer import LayerOutput, count_rows
from ._rules import FLAG, SEED, SIZE, parameter_dtype
from .functional import RouterTensors, check_layer, run_layer
from .options import (
    ExpertOptions,
    LayerKeywords,
    Packed,
    RoundingOptions,
    RouterOptions,
    layer_options,
    with_keywords,
)


class ExactBuffers(nn.Module):
    """Casts of the module leave its own buffers as they are: a narrower selection bias would pick
    other experts, and loses small updates."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        own = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in own.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Router(ExactBuffers):
    """weight [E, d] and, where asked for, bias [E] and the buffer selection_bias [E]."""

    selection_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool,
        selection_bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(num_experts, hidden_size)
        self.bias = parameter(num_experts) if bias else None
        zeros = None
        if selection_bias:
            zeros = torch.empty(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("selection_bias", zeros)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(d), as nn.Linear; selection_bias zero."""
        _uniform(self.weight.shape[1], self.weight, self.bias)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor, experts: "Experts", *arguments: Any) -> LayerOutput:
        """The whole layer, one operator. It runs inside this call and that of the experts, so that
        what gathers the parameters of a module for its call (FSDP) has gathered both."""
        tensors = RouterTensors(self.weight, self.bias, self.selection_bias)
        return experts(x, tensors, *arguments)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.selection_bias is not None:  # assign=True takes the checkpoint's dtype
            self.selection_bias = self.selection_bias.float()


class Experts(nn.Module):
    """w1 [E, g*n, d], w2 [E, d, n] and, where asked for, b1 [E, g*n], b2 [E, d]."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        gate_factor: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        columns = gate_factor * intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = parameter(num_experts, columns, hidden_size)
        self.w2 = parameter(num_experts, hidden_size, intermediate_size)
        self.b1 = parameter(num_experts, columns) if bias else None
        self.b2 = parameter(num_experts, hidden_size) if bias else None
        self.exchange: Any = None  # of sonicmoe_cpp.distributed, once the experts are spread

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as nn.Linear."""
        _uniform(self.w1.shape[2], self.w1, self.b1)
        _uniform(self.w2.shape[2], self.w2, self.b2)

    def forward(
        self,
        x: Tensor,
        router: RouterTensors,
        options: Packed,
        seed_tensor: Tensor | None,
        main_grad: bool,
    ) -> LayerOutput:
        """The whole layer, called by Router.forward."""
        experts = (self.w1, self.w2, self.b1, self.b2)
        if self.exchange is not None:
            return self.exchange.layer(x, router, experts, options, seed_tensor, main_grad)
        check_layer(x, router, experts, seed_tensor)
        return run_layer(x, router, experts, options, seed_tensor, main_grad)


def _uniform(fan_in: int, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


# Names in a state_dict of before the layer had children.
_FORMER_NAMES = {
    "router_weight": "router.weight",
    "router_b": "router.bias",
    "selection_bias": "router.selection_bias",
    **{name: f"experts.{name}" for name in ("w1", "w2", "b1", "b2")},
}


class MoE(ExactBuffers):
    """A Mixture-of-Experts MLP with its router: y = moe_layer(x).

    Children `router` (weight [E, d], with router_bias=True bias [E]) and `experts` (w1 [E, g*n, d],
    w2 [E, d, n], with expert_bias=True b1 [E, g*n] and b2 [E, d]), float32 or bfloat16.
    `selection_bias=True` (sigmoid_topk) adds the buffer `router.selection_bias` [E], which
    `update_expert_bias_` moves. It is float32 whatever torch's default dtype is, and stays so when
    the module is cast or loaded.

    `router="token_rounding"` rounds in training and is plain top-K in eval(), and for a batch of
    fewer tokens than one tile, as the last of an epoch may be. Policy `stochastic`
    advances the layer's own seed with every training forward, into the buffer `rounding_seed`:
    the seed is `seed` mixed with a number from torch's default generator, so manual_seed repeats a
    run and activation checkpointing, which restores that generator, rounds the same way again.

    `main_grad=True` accumulates parameter gradients into `param.main_grad` (float32), see
    docs/guide/python.md. Other options are those of `moe_layer`; all of them stand in `options`.

    After a forward `last_rows_per_expert` [E] int32 counts the rows computed and
    `last_rows_per_expert_before` those of token choice, before any rounding: the latter are for
    `load_balancing_loss` and `update_expert_bias_`. With `max_rows`, `last_rows_dropped` [1] int32
    counts the rows that it left no room for.

    An option that can never work is a ValueError of the constructor.
    """

    rounding_seed: Tensor
    last_rows_per_expert: Tensor | None
    last_rows_dropped: Tensor | None

    @with_keywords(RoundingOptions, RouterOptions, ExpertOptions, router="topk")
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        selection_bias: bool = False,
        router_bias: bool = False,
        expert_bias: bool = False,
        seed: int = 0,
        main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LayerKeywords],
    ) -> None:
        super().__init__()
        self.hidden_size = SIZE.check("MoE", "hidden_size", hidden_size)
        self.intermediate_size = SIZE.check("MoE", "intermediate_size", intermediate_size)
        self.num_experts = SIZE.check("MoE", "num_experts", num_experts)
        biased = FLAG.check("MoE", "selection_bias", selection_bias)
        router_bias = FLAG.check("MoE", "router_bias", router_bias)
        expert_bias = FLAG.check("MoE", "expert_bias", expert_bias)
        self.main_grad = FLAG.check("MoE", "main_grad", main_grad)
        self.seed = SEED.check("MoE", "seed", seed)
        self.options = layer_options("MoE", self.num_experts, biased, top_k=top_k, **options)
        self.top_k = self.options.router.top_k
        self._pack()
        dtype = parameter_dtype("MoE", dtype)
        self.router = Router(
            self.hidden_size, self.num_experts, bias=router_bias, selection_bias=biased,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.experts = Experts(
            self.hidden_size, self.intermediate_size, self.num_experts, bias=expert_bias,
            gate_factor=gate_factor(self.options.experts.activation), device=device, dtype=dtype,
        )  # fmt: skip
        start = torch.empty(1, dtype=torch.int64, device=device)
        self.register_buffer("rounding_seed", start, persistent=False)
        self.last_rows_per_expert = self.last_rows_dropped = None
        self._last_topk_ids: Tensor | None = None  # where they were rounded
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the constructor makes: parameters uniform in +-1/sqrt(fan in), as nn.Linear, biases
        likewise; the selection bias zero and rounding_seed the seed (to_empty() leaves either as it
        finds the memory)."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        with torch.no_grad():
            self.rounding_seed.fill_(self.seed)

    def reseed(self, rank: int) -> None:
        """Makes the seed of rounding differ from rank to rank, which would else all round an expert
        the same way."""
        self.seed = seed_of_rank(self.seed, rank)
        with torch.no_grad():
            self.rounding_seed.fill_(self.seed)

    def forward(
        self, x: Tensor, return_router: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """y [..., d]; with return_router (y, logits [..., E], rows_per_expert [E]), the rows being
        those of token choice."""
        if self.main_grad:
            check_owner(self.router, self.experts)
        rounding = self.options.rounding if self.training else None
        rounds = rounding is not None and fills_a_tile(x, rounding.tile)
        seed = self._next_seed(x) if rounds else None
        packed = self._packed if rounds else self._packed_top_k
        out: LayerOutput = self.router(x, self.experts, packed, seed, self.main_grad)
        self.last_rows_per_expert = out.rows_per_expert
        bounded = self.options.experts.max_rows is not None
        self.last_rows_dropped = out.rows_dropped if bounded else None
        self._last_topk_ids = out.topk_ids if rounds else None
        if not return_router:
            return out.y
        return out.y, out.logits, out.rows_per_expert_before

    @property
    def last_rows_per_expert_before(self) -> Tensor | None:
        """[E] int32 rows of token choice in the last forward, before any rounding."""
        if self._last_topk_ids is None:
            return self.last_rows_per_expert
        return count_rows(self._last_topk_ids, self.num_experts)

    def _next_seed(self, x: Tensor) -> Tensor | None:
        """Advances it, once what can be wrong is known to be right."""
        if self.options.rounding is None or self.options.rounding.policy != "stochastic":
            return None
        check_tensors("MoE", x=x, selection_bias=self.router.selection_bias)
        check_shape("MoE", "selection_bias", self.router.selection_bias, self.num_experts)
        if self.rounding_seed.device != x.device:  # load_state_dict(assign=True) leaves it on meta
            self.rounding_seed = torch.empty(1, dtype=torch.int64, device=x.device)
        return advance_seed(self.rounding_seed, self.seed)

    def _pack(self) -> None:
        """The options as the operators take them, in training with token rounding and else."""
        self._packed = self.options.pack()
        self._packed_top_k = dataclasses.replace(self.options, rounding=None).pack()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._pack()  # the enumerators may be those of another version

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        for former, name in _FORMER_NAMES.items():
            if prefix + former in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + former)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        router, rounding = self.options.router, self.options.rounding
        kind = "topk"
        if rounding is not None:
            kind = f"token_rounding, tile={rounding.tile}, policy={rounding.policy}"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, scoring={router.scoring}, "
            f"activation={self.options.experts.activation}, router={kind}"
        )


def seed_of_rank(seed: int, rank: int) -> int:
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**63


def fills_a_tile(x: Tensor, tile: int) -> bool:
    """Whether x [..., d] has rows for one tile; below that nothing could be kept."""
    return not isinstance(x, Tensor) or math.prod(x.shape[:-1]) >= tile


def advance_seed(buffer: Tensor, seed: int) -> Tensor:
    """The seed of one training forward, also left in `buffer` [1] int64.

    Drawn from torch's default generator, as dropout does: that is what activation checkpointing
    restores before it recomputes, in whatever order microbatches run.
    """
    draw = torch.randint(2**62, (1,), device=buffer.device, dtype=torch.int64)
    next_seed = draw ^ seed
    with torch.no_grad():
        buffer.copy_(next_seed)
    return next_seed
