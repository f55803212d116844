"""What one option may be: how it is checked, and the number that stands for it in an operator.

Errors are `ValueError`s of the form `operation: argument: expected X, got Y`.
"""

import dataclasses
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

MOST = 2**31 - 1  # of any extent: indices are int32
MOST_INT64 = 2**63 - 1
MOST_FLOAT32 = torch.finfo(torch.float32).max


def refuse(operation: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{operation}: {argument}: expected {expected}, got {got!r:.80}")


class Rule:
    """Base class; `real` rules pack into the list of reals, others into that of integers."""

    real = False

    def check(self, operation: str, argument: str, value: Any) -> Any:
        """The value as its field holds it."""
        raise NotImplementedError

    def pack(self, value: Any) -> Any:
        return value

    def unpack(self, number: Any) -> Any:
        return number


@dataclasses.dataclass(frozen=True)
class Integer(Rule):
    least: int
    most: int

    def check(self, operation: str, argument: str, value: Any) -> int:
        counts = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
        if not counts or not self.least <= value <= self.most:
            refuse(operation, argument, f"an integer in {self.least} .. {self.most}", value)
        return value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Number(Rule):
    """Finite in float32, in which the library holds it."""

    real = True

    def check(self, operation: str, argument: str, value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or not -MOST_FLOAT32 <= value <= MOST_FLOAT32:
            refuse(operation, argument, "a finite number", value)
        return float(value)


@dataclasses.dataclass(frozen=True)
class Positive(Rule):
    """Infinity too, packed as the largest float32: AOTInductor keeps the arguments of a graph as
    JSON, which has no infinity."""

    real = True

    def check(self, operation: str, argument: str, value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or not value > 0:
            refuse(operation, argument, "a positive number", value)
        return float(value)

    def pack(self, value: float) -> float:
        return min(value, MOST_FLOAT32)


@dataclasses.dataclass(frozen=True)
class Flag(Rule):
    def check(self, operation: str, argument: str, value: Any) -> bool:
        if not isinstance(value, bool):
            refuse(operation, argument, "True or False", value)
        return value

    def pack(self, value: bool) -> int:
        return int(value)

    def unpack(self, number: int) -> bool:
        return bool(number)


@dataclasses.dataclass(frozen=True)
class Name(Rule):
    """One of the library's names, packed as its enumerator."""

    codes: Mapping[str, int]

    def check(self, operation: str, argument: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.codes:
            refuse(operation, argument, f"one of {', '.join(self.codes)}", value)
        return value

    def pack(self, value: str) -> int:
        return self.codes[value]

    def unpack(self, number: int) -> str:
        return next(name for name, code in self.codes.items() if code == number)


@dataclasses.dataclass(frozen=True)
class Optional(Rule):
    """None, packed as -1, or what `rule` (of non-negative integers) takes."""

    rule: Rule

    def check(self, operation: str, argument: str, value: Any) -> Any:
        return None if value is None else self.rule.check(operation, argument, value)

    def pack(self, value: Any) -> int:
        return -1 if value is None else self.rule.pack(value)

    def unpack(self, number: int) -> Any:
        return None if number < 0 else self.rule.unpack(number)


SIZE = Integer(1, MOST)
SEED = Integer(0, MOST_INT64)
FLAG = Flag()


def parameter_dtype(operation: str, dtype: torch.dtype | None) -> torch.dtype:
    chosen = torch.get_default_dtype() if dtype is None else dtype
    if chosen not in (torch.float32, torch.bfloat16):
        source = " (torch's default dtype)" if dtype is None else ""
        raise ValueError(f"{operation}: dtype: expected float32 or bfloat16, got {chosen}{source}")
    return chosen
