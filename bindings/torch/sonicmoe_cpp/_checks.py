"""What each tensor argument of the Python functions may be, and the error for anything else.

The library checks shapes, strides, values and how dtypes go together. Here stands what has to be
known before Python converts or flattens an argument, and what a view of memory no longer shows:
type, layout, dtype, rank and device.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)
_ANY_RANK = range(1, 64)


class Rule(NamedTuple):
    dtypes: tuple[torch.dtype, ...]
    ranks: Sequence[int]
    optional: bool = False
    autocast: bool = False  # cast to autocast's dtype, so float16 may come in as well


TENSORS = {
    "x": Rule(_FLOATS, _ANY_RANK, autocast=True),
    "w1": Rule(_FLOATS, (3,), autocast=True),
    "w2": Rule(_FLOATS, (3,), autocast=True),
    "b1": Rule(_FLOATS, (2,), optional=True, autocast=True),
    "b2": Rule(_FLOATS, (2,), optional=True, autocast=True),
    "topk_ids": Rule(_INDICES, _ANY_RANK),
    "topk_weights": Rule(_FLOATS, _ANY_RANK),
    "offsets": Rule((torch.int32,), (1,)),
    "row_weights": Rule(_FLOATS, (1,), optional=True),
    "token_ids": Rule(_INDICES, (1,)),
    "expert_ids": Rule(_INDICES, (1,)),
    "pair_weights": Rule(_FLOATS, (1,)),
    "router_weight": Rule(_FLOATS, (2,)),
    "router_bias": Rule(_FLOATS, (1,), optional=True),
    "logits": Rule((*_FLOATS, torch.float16), _ANY_RANK),  # computed in float32, which holds each
    "selection_bias": Rule((torch.float32,), (1,), optional=True),
    "seed": Rule((torch.int64,), range(64), optional=True),
    "rows_per_expert": Rule((torch.int32,), (1,)),
    "rows_dropped": Rule((torch.int32,), (1,), optional=True),
}


def refuse(operation: str, argument: str, expected: str, got: object) -> NoReturn:
    raise RuntimeError(f"{operation}: {argument}: expected {expected}, got {got}")


def is_number(tensor: Tensor) -> bool:
    """Holds numbers as they are, not packed or scaled as quantised weights are."""
    return tensor.is_floating_point() and tensor.itemsize >= 2


def is_plain(tensor: Tensor) -> bool:
    """No DTensor, no quantised tensor, no other subclass."""
    return type(tensor) in (Tensor, nn.Parameter) and is_number(tensor)


def check_tensors(operation: str, **given: Any) -> None:
    """Each argument against its rule in TENSORS; all have to be on the device of the first."""
    first = device = None
    for argument, tensor in given.items():
        rule = TENSORS[argument]
        if tensor is None and rule.optional:
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            _check_type(operation, argument, tensor)
        if tensor.layout is not torch.strided or tensor.is_nested:
            refuse(operation, argument, "a dense tensor", _layout(tensor))
        if tensor.dtype not in rule.dtypes and not _autocast_takes(rule, tensor):
            refuse(operation, argument, names_of(rule.dtypes), names_of((tensor.dtype,)))
        if tensor.dim() not in rule.ranks:
            refuse(operation, argument, _ranks(rule), f"shape {list(tensor.shape)}")
        if first is None:
            first, device = argument, tensor.device
        elif tensor.device != device:
            refuse(operation, argument, f"a tensor on {device}, as {first}", tensor.device)


def check_same_device(operation: str, names: Sequence[str], given: Sequence) -> None:
    """For operators' fakes, which torch runs as soon as one argument is on the meta device."""
    first = device = None
    for argument, tensor in _tensors(names, given):
        if first is None:
            first, device = argument, tensor.device
        elif tensor.device != device:
            refuse(operation, argument, f"a tensor on {device}, as {first}", tensor.device)


def _tensors(names: Sequence[str], given: Sequence) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(names, given, strict=True):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Tensor))


def tensor_or_none(value: object) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def check_dtype(operation: str, argument: str, tensor: Tensor | None, *dtypes: torch.dtype) -> None:
    if tensor is not None and tensor.dtype not in dtypes:
        refuse(operation, argument, names_of(dtypes), names_of((tensor.dtype,)))


def check_shape(operation: str, argument: str, tensor: Tensor | None, *shape: int) -> None:
    """For arguments whose name in the library is another."""
    if tensor is not None and tensor.shape != shape:
        refuse(operation, argument, f"shape {list(shape)}", f"shape {list(tensor.shape)}")


def check_leading(operation: str, **given: Tensor) -> None:
    """Leading dimensions are equal, or flattened to one: [2, 3, d] goes with [2, 3, K] and with
    [6, K], not with [3, 2, K], whose tokens are others."""
    unflattened = [(name, t.shape[:-1]) for name, t in given.items() if t.dim() != 2]
    for argument, leading in unflattened[1:]:
        first, expected = unflattened[0]
        if leading != expected:
            got = f"shape {list(given[argument].shape)}"
            refuse(operation, argument, f"leading dimensions {list(expected)}, as {first}", got)


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """float32 or bfloat16"""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))


def _check_type(operation: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        got = "None" if value is None else f"{type(value).__name__} {value!r:.40}"
        refuse(operation, argument, "a tensor", got)
    if hasattr(value, "placements"):
        expected = "a plain tensor (to_local() or full_tensor() gives one)"
        refuse(operation, argument, expected, f"a {type(value).__name__}")


def _layout(tensor: Tensor) -> str:
    return "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"


def _ranks(rule: Rule) -> str:
    return "at least 1 dimension" if rule.ranks is _ANY_RANK else f"{rule.ranks[0]} dimensions"


def _autocast_takes(rule: Rule, tensor: Tensor) -> bool:
    device = tensor.device.type
    return (
        rule.autocast
        and tensor.dtype == torch.float16
        and device != "meta"
        and torch.is_autocast_enabled(device)
    )
