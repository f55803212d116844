"""The experts of one MoE layer of Megatron, on rows that its dispatcher has sorted."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from ..._checks import refuse
from ...functional import moe_sorted
from .checkpoint import Place, extra_states, factory, merge_experts, split_experts

_GATED = {F.silu: "swiglu", F.gelu: "geglu", F.relu: "reglu"}
_PLAIN = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", squared_relu: "relu_squared"}


class SonicExperts(MegatronModule):
    """out[r] = permuted_probs[r] * expert(x[r]), one call of `moe_sorted`.

    Parameters w1 [e, g*F, H] (gate above up) and w2 [e, H, F] of the e experts of this rank. State
    dicts, sharded ones too, have the names and shapes of Megatron's SequentialMLP.

    RuntimeError, naming the option, for a configuration that it does not compute: biases, other
    activations, fp8, fp4 and float16, tensor parallelism of the experts, latent projections and
    delayed weight gradients.
    """

    def __init__(
        self, num_local_experts: int, config: Any, submodules: Any = None, pg_collection: Any = None
    ) -> None:
        super().__init__(config=config)
        _check(config, pg_collection)
        self.activation = _activation(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        columns = width * (2 if config.gated_linear_unit else 1)
        self.w1 = self._parameter(config.init_method, columns, hidden, split=1)
        self.w2 = self._parameter(config.output_layer_init_method, hidden, width, split=2)
        self.register_state_dict_post_hook(split_experts)
        self.register_load_state_dict_pre_hook(merge_experts)

    def _parameter(self, init: Any, rows: int, columns: int, split: int) -> nn.Parameter:
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (self.num_local_experts, rows, columns)
        weight = torch.empty(shape, dtype=config.params_dtype, device=device)
        if config.perform_initialization and config.use_cpu_initialization:
            self._initialise(init, weight)
        elif config.perform_initialization:
            tracker = tensor_parallel.get_cuda_rng_tracker()
            with tracker.fork(get_expert_parallel_rng_tracker_name()):
                self._initialise(init, weight)
        parameter = nn.Parameter(weight)
        # Whether gradients are reduced over all of data parallelism, or over the experts' replicas.
        parameter.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        # Ranks of tensor parallelism have other experts: in norms none is a copy of another's.
        set_tensor_model_parallel_attributes(parameter, True, dim=split, stride=1)
        return parameter

    @staticmethod
    def _initialise(init: Any, weight: Tensor) -> None:
        for expert in weight:
            init(expert)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        x, weights = permuted_local_hidden_states, permuted_probs.float()
        if self.config.moe_apply_probs_on_input:  # of one expert a token
            x, weights = (weights[:, None] * x).to(x.dtype), torch.ones_like(weights)
        ends = tokens_per_expert.to(x.device).cumsum(0, dtype=torch.int32)
        y = moe_sorted(
            x.to(self.w1.dtype), self.w1, self.w2, ends, weights, activation=self.activation
        )
        return y.to(x.dtype), None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are not delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        single = bool((metadata or {}).get("singleton_local_shards", False))
        place = Place(
            self.ep_group.rank(), self.ep_group.size(), self.dp_group.rank(),
            self.num_local_experts, sharded_offsets, single,
        )  # fmt: skip
        gated = self.config.gated_linear_unit
        return {
            f"{prefix}w1": factory(prefix, "w1", self.w1, place, halves=gated),
            f"{prefix}w2": factory(prefix, "w2", self.w2, place, halves=False),
            **extra_states(prefix, place),
        }


def _check(config: Any, groups: Any) -> None:
    operation = "SonicExperts"
    for name, expected in (
        ("add_bias_linear", False),
        ("fp8", None),
        ("fp4", None),
        ("moe_latent_size", None),
        ("delay_wgrad_compute", False),
        ("activation_func_clamp_value", None),
        ("glu_linear_offset", 0.0),
    ):
        value = getattr(config, name, expected)
        if value != expected:
            refuse(operation, name, str(expected), value)
    if config.params_dtype not in (torch.float32, torch.bfloat16):
        refuse(operation, "params_dtype", "float32 or bfloat16", config.params_dtype)
    if groups.expt_tp.size() != 1:
        refuse(operation, "expert_tensor_parallel_size", "1", groups.expt_tp.size())


def _activation(config: Any) -> str:
    known = _GATED if config.gated_linear_unit else _PLAIN
    function = config.activation_func
    # Fused with a bias, Megatron's GELU is the tanh form.
    if function not in known or (function is F.gelu and config.bias_activation_fusion):
        names = ", ".join(known.values())
        got = getattr(function, "__name__", repr(function))
        fused = " with bias_activation_fusion" if config.bias_activation_fusion else ""
        refuse("SonicExperts", "activation_func", f"one of {names}", got + fused)
    return known[function]
