"""The experts backend: what transformers calls in place of an experts module's own loop."""

from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..._checks import is_number
from ...functional import moe
from .activations import expert_options

BACKEND = "sonicmoe_cpp"


class ExpertTensors(TypedDict):
    """Arguments of `moe`."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


def _parameters(experts: Any) -> dict[str, Tensor]:
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [up, "down_proj"]
    if experts.has_bias:
        names += [f"{up}_bias", "down_proj_bias"]
    return {name: getattr(experts, name) for name in names}


def expert_weights(experts: Any) -> ExpertTensors:
    """Views of the module's parameters."""
    w1, w2, *biases = _parameters(experts).values()
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    b1, b2 = biases or (None, None)
    return {"w1": w1, "w2": w2, "b1": b1, "b2": b2}


def _check_plain(tensors: dict[str, Tensor], path: str) -> None:
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{path}.{name}: expected a plain tensor, got {type(tensor).__name__}: gather it "
                "when the experts module is called, as fully_shard does, or use another "
                "experts_implementation"
            )
        if not is_number(tensor):
            raise ValueError(
                f"{path}.{name}: expected float32 or bfloat16, got {tensor.dtype}: quantised "
                "weights need another experts_implementation"
            )


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts backend:
    y[t] = sum over k of top_k_weights[t, k] * expert top_k_index[t, k] (x[t]).

    hidden_states x [T, d], computed in the dtype of the experts' weights; top_k_index and
    top_k_weights [T, K]. An id of num_experts or more (expert parallelism) is a dropped slot.
    ValueError where the library has no such gate or activation, or a weight is no plain tensor.
    """
    path = f"sonicmoe_cpp: {type(self).__name__}"
    options = expert_options(self, path)
    _check_plain({"hidden_states": hidden_states, **_parameters(self)}, path)
    weights = expert_weights(self)
    x = hidden_states.to(weights["w1"].dtype)
    if top_k_weights.dtype not in (torch.float32, torch.bfloat16):
        top_k_weights = top_k_weights.float()
    y = moe(x, topk_ids=top_k_index, topk_weights=top_k_weights, **weights, **options)
    return y.to(hidden_states.dtype)


def register(name: str = BACKEND) -> None:
    """Registers `name` for `from_pretrained(..., experts_implementation=name)` and
    `model.set_experts_implementation(name)`."""
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
