"""What each option that is no tensor may be: one rule each, for the functions and for `MoE`.

Every function returns what the operators take: enumerators as the integers of the C++ headers. The
results are kept, so that a call in a training loop costs one look-up.
"""

import functools
from collections.abc import Callable
from numbers import Integral, Real
from typing import NoReturn

import torch

from ._library import ACTIVATIONS, GATE_UP_LAYOUTS, POLICIES, SCORINGS

_MOST = 2**31 - 1  # of any extent: indices are int32
_MOST_INT64 = 2**63 - 1
_MOST_FLOAT32 = torch.finfo(torch.float32).max


def refuse(operation: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{operation}: {argument}: expected {expected}, got {got!r:.80}")


def integer(operation: str, argument: str, value: int, least: int, most: int) -> int:
    counts = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    if not counts or not least <= value <= most:
        refuse(operation, argument, f"an integer in {least} .. {most}", value)
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def size(operation: str, argument: str, value: int) -> int:
    return integer(operation, argument, value, 1, _MOST)


def number(operation: str, argument: str, value: float, least: float = -_MOST_FLOAT32) -> float:
    """Finite in float32, in which the library holds it."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not least <= value <= _MOST_FLOAT32:
        refuse(operation, argument, "a finite number", value)
    return float(value)


def flag(operation: str, argument: str, value: bool) -> bool:
    if not isinstance(value, bool):
        refuse(operation, argument, "True or False", value)
    return value


def enumerator(operation: str, argument: str, names: dict[str, int], name: str) -> int:
    if not isinstance(name, str) or name not in names:
        refuse(operation, argument, f"one of {', '.join(names)}", name)
    return names[name]


def _kept(check: Callable) -> Callable:
    cached = functools.lru_cache(maxsize=256, typed=True)(check)

    @functools.wraps(check)
    def call(*arguments):
        if torch.compiler.is_compiling():
            return check(*arguments)
        try:
            return cached(*arguments)
        except TypeError:  # something that cannot be hashed is no option: let `check` name it
            return check(*arguments)

    return call


@_kept
def expert_options(
    operation: str,
    activation: str,
    gate_up_layout: str,
    limit: float,
    deterministic: bool,
    workspace_limit: int | None,
) -> tuple:
    if workspace_limit is not None:
        workspace_limit = integer(operation, "workspace_limit", workspace_limit, 0, _MOST_INT64)
    if not isinstance(limit, Real) or isinstance(limit, bool) or not limit > 0:
        refuse(operation, "limit", "a positive number", limit)
    return (
        enumerator(operation, "activation", ACTIVATIONS, activation),
        enumerator(operation, "gate_up_layout", GATE_UP_LAYOUTS, gate_up_layout),
        float(limit),
        flag(operation, "deterministic", deterministic),
        workspace_limit,
    )


@_kept
def router_options(
    operation: str,
    num_experts: int,
    top_k: int,
    scoring: str,
    renormalize: bool | None,
    bias: str | None,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple:
    """`bias` is the name of the argument that holds a selection bias, None without one."""
    top_k = integer(operation, "top_k", top_k, 1, num_experts)
    code = enumerator(operation, "scoring", SCORINGS, scoring)
    if renormalize is not None:
        flag(operation, "renormalize", renormalize)
    if scoring == "topk_softmax" and renormalize is False:
        refuse(operation, "renormalize", "None or True with topk_softmax", renormalize)
    if scoring != "sigmoid_topk" and bias is not None:
        raise ValueError(f"{operation}: {bias}: expected none with {scoring}, got one")
    groups = num_experts if scoring == "sigmoid_topk" else 1
    num_groups = integer(operation, "num_groups", num_groups, 1, max(groups, 1))
    if num_experts % num_groups != 0:
        refuse(operation, "num_groups", f"a divisor of {num_experts} experts", num_groups)
    top_groups = integer(operation, "top_groups", top_groups, 1, num_groups)
    selectable = top_groups * (num_experts // num_groups)
    if top_k > selectable:
        expected = f"at most {selectable}, the experts of {top_groups} of {num_groups} groups"
        refuse(operation, "top_k", expected, top_k)
    scale = number(operation, "scale", scale)
    return top_k, code, renormalize, num_groups, top_groups, scale


@_kept
def rounding_options(operation: str, tile: int, policy: str) -> tuple[int, int]:
    return size(operation, "tile", tile), enumerator(operation, "policy", POLICIES, policy)


@_kept
def loss_options(operation: str, num_experts: int, top_k: int, scoring: str) -> tuple[int, int]:
    top_k = integer(operation, "top_k", top_k, 1, num_experts)
    return top_k, enumerator(operation, "scoring", SCORINGS, scoring)


def router_kind(operation: str, router: str) -> bool:
    """Whether it rounds."""
    names = {"topk": 0, "token_rounding": 1}
    return bool(enumerator(operation, "router", names, router))


def seed_number(operation: str, seed: int) -> int:
    return integer(operation, "seed", seed, 0, _MOST_INT64)


def parameter_dtype(operation: str, dtype: torch.dtype | None) -> torch.dtype:
    chosen = torch.get_default_dtype() if dtype is None else dtype
    if chosen not in (torch.float32, torch.bfloat16):
        source = " (torch's default dtype)" if dtype is None else ""
        raise ValueError(f"{operation}: dtype: expected float32 or bfloat16, got {chosen}{source}")
    return chosen
