"""Which of the library's activations an experts module computes.

Recognised by identity: the function itself, or the class whose forward runs. A name says little
(nn.GELU has two formulas), and a subclass may compute something else.
"""

import functools
import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations as hf
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ...options import ExpertKeywords
from .plain import has_hooks, has_own_forward, only_moves

_FUNCTIONS = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"), (torch.relu, "relu"))
# Forwards that depend on nothing but their input. GELUTanh's python form, NewGELU, FastGELU and
# AccurateGELU write the tanh form out; their constants agree to 1e-11.
_FORWARDS = {
    nn.SiLU.forward: "silu",
    hf.SiLUActivation.forward: "silu",
    nn.ReLU.forward: "relu",
    hf.ReLUSquaredActivation.forward: "relu_squared",
    hf.NewGELUActivation.forward: "gelu_tanh",
    hf.FastGELUActivation.forward: "gelu_tanh",
}
_GELUS_BY_ATTRIBUTE = (hf.GELUActivation.forward, hf.GELUTanh.forward)
_PYTHON_GELUS = {
    hf.GELUActivation._gelu_python: "gelu",
    hf.GELUTanh._gelu_tanh_python: "gelu_tanh",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
# alpha of gpt-oss in (up + 1) * gate * sigmoid(alpha * gate); the library knows no other.
_CLAMPED_ALPHA = 1.702
_CLAMPED_GATE = GptOssExperts._apply_gate


def _function(act: Any) -> str | None:
    """A function, or a partial of one that sets options only."""
    bare = act.func if isinstance(act, functools.partial) else act
    name = next((name for function, name in _FUNCTIONS if function is bare), None)
    if name is None or bare is act:
        return name
    if act.args or not set(act.keywords) <= {"approximate", "inplace"}:
        return None
    return name if name != "gelu" else _gelu(act.keywords.get("approximate", "none"))


def _gelu(approximate: str) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


def activation_name(act: Any) -> str | None:
    """The library's name of act, a module or a function of one tensor; None for any other."""
    if not isinstance(act, nn.Module):
        return _function(act) if callable(act) else None
    forward = type(act).forward
    if has_own_forward(act, forward) and not only_moves(act, forward):
        return None
    if forward is nn.GELU.forward:
        return _gelu(str(act.approximate))
    if forward in _GELUS_BY_ATTRIBUTE:
        if isinstance(act.act, types.MethodType):
            return _PYTHON_GELUS.get(act.act.__func__)
        return _function(act.act)
    if forward is hf.AccurateGELUActivation.forward:
        exact = act.precomputed_constant == math.sqrt(2 / math.pi)
        return "gelu_tanh" if exact else None
    return _FORWARDS.get(forward)


def _clamped_gate(experts: Any, path: str) -> ExpertKeywords:
    alpha, limit = experts.alpha, experts.limit
    if alpha != _CLAMPED_ALPHA:
        raise ValueError(f"{path}.alpha (of _apply_gate): expected {_CLAMPED_ALPHA}, got {alpha}")
    if not isinstance(limit, (int, float)) or not limit > 0:
        raise ValueError(f"{path}.limit (of _apply_gate): expected a number above 0, got {limit}")
    return {
        "activation": "swiglu_clamped",
        "gate_up_layout": "interleaved",
        "limit": float(limit),
    }


def _act_fn(act: Any, gated: bool, path: str) -> str:
    name = activation_name(act)
    known = _GATED.get(name or "") if gated else name
    if known is None:
        expected = ", ".join(_GATED) + ("" if gated else ", relu_squared")
        got = act if isinstance(act, nn.Module) else getattr(act, "__qualname__", repr(act))
        raise ValueError(f"{path}.act_fn: expected one of {expected}, got the activation {got}")
    if isinstance(act, nn.Module) and has_hooks(act):
        raise ValueError(
            f"{path}.act_fn: expected no hooks (the activation is part of a kernel), got some: "
            "hook the experts module, or use another experts_implementation"
        )
    return known


def expert_options(experts: Any, path: str) -> ExpertKeywords:
    """activation, gate_up_layout and limit of an experts module, as options of `moe`.

    ValueError, naming `path`, where the library has no such activation or gate.
    """
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"{path}.post_expert_norm: expected none, got a norm of each expert's output"
        )
    if experts.has_gate:
        gate = type(experts)._apply_gate
        if "_apply_gate" in experts.__dict__ or gate not in (_default_apply_gate, _CLAMPED_GATE):
            raise ValueError(
                f"{path}._apply_gate: expected act_fn(gate) * up or the gate of gpt-oss, got "
                f"{experts._apply_gate.__qualname__}"
            )
        if gate is _CLAMPED_GATE:
            return _clamped_gate(experts, path)
        if not experts.is_concatenated:
            raise ValueError(
                f"{path}.is_concatenated: expected True (its gate splits halves), got False"
            )
    activation = _act_fn(experts.act_fn, experts.has_gate, path)
    return {"activation": activation, "gate_up_layout": "concatenated"}
