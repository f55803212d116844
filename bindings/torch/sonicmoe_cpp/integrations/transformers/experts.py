"""The experts backend: what transformers calls in place of an experts module's own loop."""

import importlib.util
from typing import Any, TypedDict

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..._checks import is_number, refuse
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
    return _weights(experts, _parameters(experts))


def _weights(experts: Any, parameters: dict[str, Tensor]) -> ExpertTensors:
    w1, w2, *biases = parameters.values()
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    b1, b2 = biases or (None, None)
    return {"w1": w1, "w2": w2, "b1": b1, "b2": b2}


def check_parameters(experts: Any, path: str) -> None:
    """ValueError unless all its parameters are the plain tensors that the backend reads."""
    parameters = _parameters(experts)
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    if names != parameters.keys():
        raise ValueError(f"{path}: expected parameters {sorted(parameters)}, got {sorted(names)}")
    _check_plain(parameters, path)


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
    self: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    token_ids: Tensor | None = None,
    exchange: Any = None,
) -> Tensor:
    """The experts backend:
    y[t] = sum over k of top_k_weights[t, k] * expert top_k_index[t, k] (x[t]).

    hidden_states x [T, d], computed in the dtype of the experts' weights; top_k_index and
    top_k_weights [T, K]. An id of num_experts or more (expert parallelism) is a dropped slot.
    ValueError where the library has no such gate or activation, or a weight is no plain tensor.

    exchange, or that of parallelize_experts: the experts are spread over several processes, and ids
    name those of all. token_ids [P] then go with ids and weights [P], as in `moe_pairs`.
    """
    path = f"sonicmoe_cpp: {type(self).__name__}"
    options = expert_options(self, path)
    exchange = getattr(self, "exchange", None) if exchange is None else exchange
    parameters = _parameters(self)
    if exchange is not None:
        parameters = {name: exchange.local(each) for name, each in parameters.items()}
    _check_plain({"hidden_states": hidden_states, **parameters}, path)
    weights = _weights(self, parameters)
    x = hidden_states.to(weights["w1"].dtype)
    if top_k_weights.dtype not in (torch.float32, torch.bfloat16):
        top_k_weights = top_k_weights.float()
    if exchange is None:
        y = moe(x, topk_ids=top_k_index, topk_weights=top_k_weights, **weights, **options)
    else:
        pairs = {} if token_ids is None else {"token_ids": token_ids}
        y = exchange.experts(x, top_k_index, top_k_weights, **pairs, **weights, **options)
    return y.to(hidden_states.dtype)


def register_expert_parallel(
    name: str = BACKEND,
    *,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
    on_overflow: str = "count",
) -> None:
    """Registers `name` for `DistributedConfig(ep_implementation=name)`, which goes with
    `experts_implementation="sonicmoe_cpp"`. Options as in `sonicmoe_cpp.distributed.moe`.

    Errors: RuntimeError where this transformers takes no such thing of others, or torch has no
    processes. When a model is made: a gate or activation that the library does not have, another
    experts_implementation, or ranks that differ.
    """
    if not _has_expert_parallel():
        expected = "a version with transformers.distributed.expert_parallel (5.23 has it)"
        refuse("register_expert_parallel", "transformers", expected, transformers.__version__)
    place = importlib.import_module(".expert_parallel", __package__)
    place.register(
        name, row_capacity=row_capacity, keep_received=keep_received, on_overflow=on_overflow
    )


def _has_expert_parallel() -> bool:
    place = "transformers.distributed.expert_parallel"
    return dist.is_available() and importlib.util.find_spec(place) is not None


def register(name: str = BACKEND) -> None:
    """Registers `name` for `from_pretrained(..., experts_implementation=name)` and
    `model.set_experts_implementation(name)`, and, where transformers has such an interface, for
    `DistributedConfig(ep_implementation=name)` (register_expert_parallel)."""
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    if not _has_expert_parallel():
        return
    place = importlib.import_module(".expert_parallel", __package__)
    if not place.is_registered(name):  # else with options of the caller's
        register_expert_parallel(name)
