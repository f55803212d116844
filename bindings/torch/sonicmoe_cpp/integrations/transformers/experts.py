"""The experts backend: transformers calls experts_forward in place of an experts module's loop."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ...functional import moe
from .activations import expert_options

BACKEND = "sonicmoe_cpp"


def expert_weights(experts: nn.Module) -> dict[str, Tensor | None]:
    """w1, w2, b1, b2 as views of the module's parameters."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, up), experts.down_proj
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    b1 = getattr(experts, f"{up}_bias") if experts.has_bias else None
    b2 = experts.down_proj_bias if experts.has_bias else None
    return {"w1": w1, "w2": w2, "b1": b1, "b2": b2}


def _refuse_wrapped(weights: dict[str, Tensor | None], path: str) -> None:
    for name, weight in weights.items():
        if weight is not None and is_traceable_wrapper_subclass(weight):
            raise ValueError(
                f"{path}: {name}: expected a plain tensor, got {type(weight).__name__}: shard or "
                "quantise in a way that gathers the weights when the experts module is called, or "
                'use experts_implementation="grouped_mm"'
            )


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts backend: y[t] = sum over k of top_k_weights[t, k] * expert top_k_index[t, k] (x[t]).

    hidden_states [T, d], computed in the dtype of the experts' weights; top_k_index, top_k_weights
    [T, K]; an id of num_experts or more (expert parallelism) is a dropped slot. ValueError where the
    gate, the activation or the kind of weights is not supported.
    """
    path = f"sonicmoe_cpp: {type(self).__name__}"
    options = expert_options(self, path)
    weights = expert_weights(self)
    _refuse_wrapped(weights, path)
    x = hidden_states.to(weights["w1"].dtype)
    if top_k_weights.dtype not in (torch.float32, torch.bfloat16):
        top_k_weights = top_k_weights.float()
    y = moe(x, topk_ids=top_k_index, topk_weights=top_k_weights, **weights, **options)
    return y.to(hidden_states.dtype)


def register(name: str = BACKEND) -> None:
    """Registers `name` for `from_pretrained(..., experts_implementation=name)` and
    `model.set_experts_implementation(name)`."""
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
