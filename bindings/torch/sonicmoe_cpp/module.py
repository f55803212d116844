"""The layer as a module."""

import math

import torch
from torch import Tensor, nn

from . import _options
from ._checks import check_shape, check_tensors
from ._library import gate_factor
from ._moe_layer import count_rows
from .functional import run_layer


class MoE(nn.Module):
    """A Mixture-of-Experts MLP with its router: y = moe_layer(x).

    Parameters, float32 or bfloat16: router_weight [E, d], w1 [E, g*n, d], w2 [E, d, n] and, where
    asked for, router_b [E], b1 [E, g*n], b2 [E, d]. `selection_bias=True` (sigmoid_topk) adds the
    buffer `selection_bias` [E], which `update_expert_bias_` moves. It is float32 whatever torch's
    default dtype is, and stays so when the module is cast or loaded.

    `router="token_rounding"` rounds in training and is plain top-K in eval(). Policy `stochastic`
    advances the layer's own seed with every training forward, into the buffer `rounding_seed`:
    the seed is `seed` mixed with a number from torch's default generator, so manual_seed repeats a
    run and activation checkpointing, which restores that generator, rounds the same way again.

    `main_grad=True` accumulates parameter gradients into `param.main_grad` (float32), see
    docs/guide/python.md. `deterministic=False` as in `moe`.

    After a forward `last_rows_per_expert` [E] int32 counts the rows computed and
    `last_rows_per_expert_before` those of token choice, before any rounding: the latter are for
    `load_balancing_loss` and `update_expert_bias_`.

    An option that can never work is a ValueError of the constructor.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax_topk",
        renormalize: bool | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        selection_bias: bool = False,
        router: str = "topk",
        tile: int = 128,
        policy: str = "nearest",
        seed: int = 0,
        activation: str = "swiglu",
        gate_up_layout: str = "concatenated",
        limit: float = 7.0,
        bias: bool = False,
        router_bias: bool = False,
        main_grad: bool = False,
        workspace_limit: int | None = None,
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = _options.size("MoE", "hidden_size", hidden_size)
        intermediate_size = _options.size("MoE", "intermediate_size", intermediate_size)
        num_experts = _options.size("MoE", "num_experts", num_experts)
        _options.flag("MoE", "selection_bias", selection_bias)
        _options.flag("MoE", "bias", bias)
        _options.flag("MoE", "router_bias", router_bias)
        _options.flag("MoE", "main_grad", main_grad)
        experts = (activation, gate_up_layout, limit, deterministic, workspace_limit)
        code, *_ = _options.expert_options("MoE", *experts)
        given = "selection_bias" if selection_bias else None
        routing = (scoring, renormalize, given, num_groups, top_groups, scale)
        top_k, *_ = _options.router_options("MoE", num_experts, top_k, *routing)
        _options.router_kind("MoE", router)
        _options.rounding_options("MoE", tile, policy)
        dtype = _options.parameter_dtype("MoE", dtype)
        columns = gate_factor(code) * intermediate_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = router
        self.tile = tile
        self.policy = policy
        self.seed = _options.seed_number("MoE", seed)
        self.main_grad = main_grad
        self.options = {
            "scoring": scoring,
            "renormalize": renormalize,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "scale": scale,
            "activation": activation,
            "gate_up_layout": gate_up_layout,
            "limit": limit,
            "workspace_limit": workspace_limit,
            "deterministic": deterministic,
        }

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router_weight = parameter(num_experts, hidden_size)
        self.w1 = parameter(num_experts, columns, hidden_size)
        self.w2 = parameter(num_experts, hidden_size, intermediate_size)
        self.router_b = parameter(num_experts) if router_bias else None
        self.b1 = parameter(num_experts, columns) if bias else None
        self.b2 = parameter(num_experts, hidden_size) if bias else None
        zeros = None
        if selection_bias:
            zeros = torch.empty(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("selection_bias", zeros)
        start = torch.empty(1, dtype=torch.int64, device=device)
        self.register_buffer("rounding_seed", start, persistent=False)
        self.last_rows_per_expert: Tensor | None = None
        self._last_topk_ids: Tensor | None = None  # where they were rounded
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the constructor makes: parameters uniform in +-1/sqrt(fan in), as nn.Linear, biases
        likewise; selection_bias zero and rounding_seed the seed (to_empty() leaves either as it
        finds the memory)."""
        fans = {"router_weight": self.hidden_size, "router_b": self.hidden_size}
        fans |= {"w1": self.hidden_size, "b1": self.hidden_size}
        fans |= {"w2": self.intermediate_size, "b2": self.intermediate_size}
        for name, fan in fans.items():
            if getattr(self, name) is not None:
                nn.init.uniform_(getattr(self, name), -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        with torch.no_grad():
            self.rounding_seed.fill_(self.seed)
            if self.selection_bias is not None:
                self.selection_bias.zero_()

    def forward(
        self, x: Tensor, return_router: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """y [..., d]; with return_router (y, logits [..., E], rows_per_expert [E]), the rows being
        those of token choice."""
        check_tensors("MoE", x=x, selection_bias=self.selection_bias)
        check_shape("MoE", "selection_bias", self.selection_bias, self.num_experts)
        rounds = self.training and self.router == "token_rounding"
        out = run_layer(
            x,
            self.router_weight,
            self.w1,
            self.w2,
            self.top_k,
            router_b=self.router_b,
            b1=self.b1,
            b2=self.b2,
            bias=self.selection_bias,
            router="token_rounding" if rounds else "topk",
            tile=self.tile,
            policy=self.policy,
            seed=self._next_seed(x.device) if rounds else 0,
            main_grad=self.main_grad,
            **self.options,
        )
        self.last_rows_per_expert = out.rows_per_expert
        self._last_topk_ids = out.topk_ids if rounds else None
        y = out.y.reshape(x.shape)
        if not return_router:
            return y
        logits = out.logits.reshape(*x.shape[:-1], self.num_experts)
        return y, logits, self.last_rows_per_expert_before

    @property
    def last_rows_per_expert_before(self) -> Tensor | None:
        """[E] int32 rows of token choice in the last forward, before any rounding."""
        if self._last_topk_ids is None:
            return self.last_rows_per_expert
        return count_rows(self._last_topk_ids, self.num_experts)

    def _next_seed(self, device: torch.device) -> int | Tensor:
        if self.policy != "stochastic":
            return 0
        if self.rounding_seed.device != device:  # load_state_dict(assign=True) leaves it on meta
            self.rounding_seed = torch.empty(1, dtype=torch.int64, device=device)
        return advance_seed(self.rounding_seed, self.seed)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        # A narrower selection bias would pick other experts, and loses small updates.
        exact = {
            name: (buffer, buffer.dtype)
            for name, buffer in self._buffers.items()
            if buffer is not None
        }
        super()._apply(fn, recurse)
        for name, (buffer, dtype) in exact.items():
            if getattr(self, name).dtype != dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.selection_bias is not None:  # assign=True takes the checkpoint's dtype
            self.selection_bias = self.selection_bias.float()

    def extra_repr(self) -> str:
        rounding = f", tile={self.tile}, policy={self.policy}" if self.router != "topk" else ""
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, top_k={self.top_k}, "
            f"scoring={self.options['scoring']}, activation={self.options['activation']}, "
            f"router={self.router}{rounding}"
        )


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
