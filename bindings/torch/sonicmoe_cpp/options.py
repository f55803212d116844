"""The options: one frozen dataclass for each option struct of the library, checked when it is made.

A new option is one field here (its rule beside it, its type in the keywords below), one line in
csrc/options.cpp, one member of the struct in include/sonicmoe, and the code that obeys it.

`pack()` gives what the operators take: integers and reals, the fields in their order, which is the
order in csrc/options.cpp. Tensors (a selection bias, a seed) travel as tensors.
"""

import dataclasses
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from typing import Any, TypedDict, TypeVar, cast

import torch

from ._library import (
    ACTIVATIONS,
    ALWAYS_RENORMALIZED,
    BIASED,
    GATE_UP_LAYOUTS,
    POLICIES,
    SCORINGS,
)
from ._rules import MOST_INT64, SEED, SIZE, Flag, Integer, Name, Number, Optional, Positive, Rule
from ._rules import refuse as refuse

OptionsType = TypeVar("OptionsType", bound="Options")
Function = TypeVar("Function", bound=Callable[..., Any])


# Integers and reals. No class of its own: torch.compile takes plain tuples as constants.
Packed = tuple[tuple[int, ...], tuple[float, ...]]


def joined(*parts: Packed) -> Packed:
    integers, reals = zip(*parts, strict=True)
    return tuple(itertools.chain(*integers)), tuple(itertools.chain(*reals))


def option(default: Any, rule: Rule) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class Options:
    """Base class. Errors begin with `operation`, by default the name of the class."""

    operation: InitVar[str | None] = None

    def __post_init__(self, operation: str | None) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = _rule(field).check(operation or type(self).__name__, field.name, value)
            object.__setattr__(self, field.name, value)

    def pack(self) -> Packed:
        integers: list[int] = []
        reals: list[float] = []
        for field in dataclasses.fields(self):
            numbers = reals if _rule(field).real else integers
            numbers.append(_rule(field).pack(getattr(self, field.name)))
        return tuple(integers), tuple(reals)

    @classmethod
    def unpack(
        cls: type[OptionsType], integers: Iterator[int], reals: Iterator[float]
    ) -> OptionsType:
        """The inverse of pack, for fakes: takes what is its own from the front of both."""
        values = {}
        for field in dataclasses.fields(cls):
            number = next(reals if _rule(field).real else integers)
            values[field.name] = _rule(field).unpack(number)
        return cls(**values)


def _rule(field: dataclasses.Field) -> Rule:
    return field.metadata["rule"]


@dataclass(frozen=True)
class ExpertOptions(Options):
    """sonicmoe::ExpertOptions and the limit of a call's scratch in bytes (None: no limit)."""

    activation: str = option("swiglu", Name(ACTIVATIONS))
    gate_up_layout: str = option("concatenated", Name(GATE_UP_LAYOUTS))
    limit: float = option(7.0, Positive())
    deterministic: bool = option(True, Flag())
    max_rows: int | None = option(None, Optional(Integer(0, MOST_INT64)))
    zero_absent_tokens: bool = option(True, Flag())
    workspace_limit: int | None = option(None, Optional(Integer(0, MOST_INT64)))


@dataclass(frozen=True)
class RoutedExpertOptions(ExpertOptions):
    """And the id of the first expert, of calls that bring their routing."""

    first_expert: int = option(0, Integer(0, MOST_INT64))


@dataclass(frozen=True)
class RouterOptions(Options):
    """sonicmoe::RouterOptions without its tensor. What depends on the number of experts is checked
    by `fit`."""

    top_k: int = option(1, SIZE)
    scoring: str = option("softmax_topk", Name(SCORINGS))
    renormalize: bool | None = option(None, Optional(Flag()))
    num_groups: int = option(1, SIZE)
    top_groups: int = option(1, SIZE)
    scale: float = option(1.0, Number())

    def fit(self, operation: str, num_experts: int, biased: bool) -> "RouterOptions":
        """Itself, for a router over num_experts, with a selection bias or without."""
        Integer(1, num_experts).check(operation, "top_k", self.top_k)
        if self.scoring in ALWAYS_RENORMALIZED and self.renormalize is False:
            expected = f"None or True with {self.scoring}"
            refuse(operation, "renormalize", expected, self.renormalize)
        if self.scoring not in BIASED and biased:
            refuse(operation, "selection_bias", f"none with {self.scoring}", "one")
        most = num_experts if self.scoring in BIASED else 1
        Integer(1, most).check(operation, "num_groups", self.num_groups)
        if num_experts % self.num_groups != 0:
            refuse(operation, "num_groups", f"a divisor of {num_experts} experts", self.num_groups)
        Integer(1, self.num_groups).check(operation, "top_groups", self.top_groups)
        selectable = self.top_groups * (num_experts // self.num_groups)
        if self.top_k > selectable:
            groups = f"{self.top_groups} of {self.num_groups} groups"
            refuse(operation, "top_k", f"at most {selectable}, the experts of {groups}", self.top_k)
        return self


@dataclass(frozen=True)
class RoundingOptions(Options):
    """sonicmoe::RoundingOptions without its tensor."""

    tile: int = option(128, SIZE)
    policy: str = option("nearest", Name(POLICIES))
    seed: int = option(0, SEED)


@dataclass(frozen=True)
class LayerOptions:
    """sonicmoe::MoELayerOptions; rounding None is plain top-K."""

    experts: ExpertOptions
    router: RouterOptions
    rounding: RoundingOptions | None

    def pack(self) -> Packed:
        rounds: Packed = ((int(self.rounding is not None),), ())
        rounding: Packed = ((), ()) if self.rounding is None else self.rounding.pack()
        return joined(self.experts.pack(), self.router.pack(), rounds, rounding)

    @classmethod
    def unpack(cls, integers: Iterator[int], reals: Iterator[float]) -> "LayerOptions":
        experts = ExpertOptions.unpack(integers, reals)
        router = RouterOptions.unpack(integers, reals)
        rounds = bool(next(integers))
        return cls(experts, router, RoundingOptions.unpack(integers, reals) if rounds else None)


# ---------------------------------------------------------------------- keywords of the functions


class ExpertKeywords(TypedDict, total=False):
    activation: str
    gate_up_layout: str
    limit: float
    deterministic: bool
    max_rows: int | None
    zero_absent_tokens: bool
    workspace_limit: int | None


class RoutedExpertKeywords(ExpertKeywords, total=False):
    first_expert: int


class RouterKeywords(TypedDict, total=False):
    scoring: str
    renormalize: bool | None
    num_groups: int
    top_groups: int
    scale: float


class RoundingKeywords(TypedDict, total=False):
    tile: int
    policy: str


class RouterAndRoundingKeywords(RouterKeywords, RoundingKeywords, total=False):
    pass


class LayerKeywords(ExpertKeywords, RouterKeywords, RoundingKeywords, total=False):
    router: str


_ROUTERS = Name({"topk": 0, "token_rounding": 1})
_FORMER_NAMES = {"bias": "selection_bias", "router_b": "router_bias"}


def layer_options(
    operation: str,
    num_experts: int,
    biased: bool,
    router: str = "topk",
    **keywords: Any,
) -> LayerOptions:
    """From the keywords of moe_layer, `top_k` and an int `seed` included."""
    classes = ExpertOptions, RouterOptions, RoundingOptions
    experts, routing, rounding = _split(operation, keywords, *classes)
    return LayerOptions(
        ExpertOptions(operation, **experts),
        RouterOptions(operation, **routing).fit(operation, num_experts, biased),
        check_rounding(operation, router, **rounding),
    )


def check_rounding(operation: str, router: str, **rounding: Any) -> RoundingOptions | None:
    """None for plain top-K; its options have to be right all the same."""
    rounds = _ROUTERS.check(operation, "router", router) == "token_rounding"
    options = RoundingOptions(operation, **rounding)
    return options if rounds else None


def _split(operation: str, keywords: dict[str, Any], *classes: type[Options]) -> list[dict]:
    """Each class's share of the keywords."""
    parts = []
    for cls in classes:
        names = [field.name for field in dataclasses.fields(cls) if field.name in keywords]
        parts.append({name: keywords.pop(name) for name in names})
    for name in keywords:
        message = f"{operation}() got an unexpected keyword argument {name!r}"
        former = _FORMER_NAMES | ({"bias": "expert_bias"} if operation == "MoE" else {})
        if name in former:
            message += f": it is called {former[name]!r}"
        raise TypeError(message)
    return parts


def _kept(pack: Function) -> Function:
    """Packs each combination once: a call in a training loop costs one look-up. In a graph of
    torch.compile or torch.export the result is a constant."""
    cached = functools.lru_cache(maxsize=256, typed=True)(pack)

    @functools.wraps(pack)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            arguments = tuple(_specialised(value) for value in arguments)
            keywords = {name: _specialised(value) for name, value in keywords.items()}
            return pack(*arguments, **keywords)
        try:
            return cached(*arguments, **keywords)
        except TypeError:  # what cannot be hashed is no option: let `pack` name it
            return pack(*arguments, **keywords)

    # What torch.compiler.assume_constant_result(pack) does, without importing torch._dynamo now.
    # After wraps(), which would mark `call` as well.
    pack._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return cast(Function, call)


def _specialised(value: Any) -> Any:
    """A symbolic integer as the number it stands for, which becomes a guard of the graph."""
    symbolic = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return operator.index(value) if symbolic else value


@_kept
def packed_experts(operation: str, **keywords: Any) -> Packed:
    (experts,) = _split(operation, keywords, RoutedExpertOptions)
    return RoutedExpertOptions(operation, **experts).pack()


@_kept
def packed_sorted(operation: str, **keywords: Any) -> Packed:
    (given,) = _split(operation, keywords, ExpertOptions)
    experts = RoutedExpertOptions(operation, **given)
    if experts.max_rows is not None:
        refuse(operation, "max_rows", "None, as all rows are the output's", experts.max_rows)
    return experts.pack()


@_kept
def packed_router(operation: str, num_experts: int, biased: bool, **keywords: Any) -> Packed:
    (router,) = _split(operation, keywords, RouterOptions)
    return RouterOptions(operation, **router).fit(operation, num_experts, biased).pack()


@_kept
def packed_rounding(operation: str, num_experts: int, biased: bool, **keywords: Any) -> Packed:
    """Of the router, then of the rounding."""
    router, rounding = _split(operation, keywords, RouterOptions, RoundingOptions)
    routing = RouterOptions(operation, **router).fit(operation, num_experts, biased)
    return joined(routing.pack(), RoundingOptions(operation, **rounding).pack())


@_kept
def packed_layer(operation: str, num_experts: int, biased: bool, **keywords: Any) -> Packed:
    return layer_options(operation, num_experts, biased, **keywords).pack()


@_kept
def packed_loss(operation: str, num_experts: int, top_k: int, scoring: str) -> tuple[int, int]:
    """top_k and the scoring's enumerator."""
    top_k = Integer(1, num_experts).check(operation, "top_k", top_k)
    name = Name(SCORINGS)
    return top_k, name.pack(name.check(operation, "scoring", scoring))


def with_keywords(*classes: type[Options], **more: Any) -> Callable[[Function], Function]:
    """Shows the fields of classes, and `more`, as keywords in help() and inspect.signature(). (Type
    checkers and editors read the TypedDicts.)"""

    def document(function: Function) -> Function:
        signature = inspect.signature(function)
        *named, _ = signature.parameters.values()
        known = {parameter.name for parameter in named}
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for cls in classes
            for field in dataclasses.fields(cls)
            if field.name not in known
        ]
        keywords += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in more.items()
        ]
        shown: Any = function
        shown.__signature__ = signature.replace(parameters=[*named, *keywords])
        return function

    return document
