"""Loads the compiled operators and gives the integers that stand for their options."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._checks import check_same_device

_PATH = Path(__file__).with_name("_C.so")
if not _PATH.exists():
    raise ImportError(
        f"sonicmoe_cpp: {_PATH} is missing: build the CMake target sonicmoe_torch with "
        "-DSONICMOE_BUILD_TORCH=ON (docs/guide/python.md)"
    )
try:
    torch.ops.load_library(str(_PATH))
except OSError as error:
    raise ImportError(
        f"sonicmoe_cpp: {_PATH} cannot be loaded: {error.__cause__ or error}. Install the library "
        "that is missing (libdnnl is oneDNN), or the package's wheel, which needs torch alone"
    ) from error

ops = torch.ops.sonicmoe_cpp

__version__: str = ops.version()  # the library's: include/sonicmoe/version.hpp


def run(operator: Callable, *arguments: Any) -> Any:
    """The operator's result. Where torch's allocator has no room on the GPU it raises torch's own
    error; a compiled graph calls the operator itself and raises RuntimeError of the same text."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "CUDA out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            torch.cuda.mem_get_info()  # raises if an earlier kernel's error is what failed
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def register_fake(name: str) -> Callable:
    """As torch.library.register_fake. torch runs the fake of an operator as soon as one argument is
    on the meta device, whatever the others are on: that is refused here."""
    names = [argument.name for argument in getattr(ops, name).default._schema.arguments]

    def register(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*given: Any) -> Any:
            check_same_device(name, names, given)
            return fake(*given)

        torch.library.register_fake(f"sonicmoe_cpp::{name}", checked)
        return fake

    return register


class _Enum(NamedTuple):
    """An enumeration of the library, by name."""

    codes: dict[str, int]
    traits: dict[str, list[str]]

    def having(self, trait: str) -> frozenset[str]:
        return frozenset(name for name, words in self.traits.items() if trait in words)


def _enum(kind: int) -> _Enum:
    rows = [row.split() for row in ops.enum_names(kind).split(",")]
    return _Enum({row[0]: int(row[1]) for row in rows}, {row[0]: row[2:] for row in rows})


class Backend(NamedTuple):
    """One implementation: `name` "cuda", "cpu" or "reference", and what it runs on, or why it
    is off."""

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """The library's implementations in order of preference, as `sonicmoe info` lists them."""
    lines = (line.split("\t") for line in ops.backend_list().split("\n"))
    return [Backend(name, available == "1", reason) for name, available, reason in lines]


_activations, _scorings = _enum(0), _enum(2)

# The library's own names and what it says of them.
ACTIVATIONS = _activations.codes
GATE_UP_LAYOUTS = _enum(1).codes
SCORINGS = _scorings.codes
POLICIES = _enum(3).codes
GATED = _activations.having("gated")  # gate and up in one projection: g = 2
ALWAYS_RENORMALIZED = _scorings.having("renormalizes")
BIASED = _scorings.having("biased")  # take a selection bias and groups

# How moe_forward reads its routing tensors.
FORM_TOP_K, FORM_SORTED, FORM_PAIRS = range(3)


def gate_factor(activation: str) -> int:
    """g: rows of w1 per expert and unit of intermediate width."""
    return 2 if activation in GATED else 1


def rounded_capacity(num_tokens: int, num_experts: int, top_k: int, tile: int, policy: str) -> int:
    """Length of the pair list of token rounding, as sonicmoe::rounded_capacity (for symbolic T)."""
    pairs = num_tokens * top_k
    if policy == "down":
        return pairs
    if policy == "balanced":
        return pairs + tile // 2
    if policy == "nearest":
        return pairs + num_experts * (tile // 2)
    return pairs + num_experts * (tile - 1)


def row_capacity(num_pairs: int, max_rows: int | None) -> int:
    """C: rows of H, as sonicmoe::MoEShape::row_capacity (for symbolic T)."""
    return num_pairs if max_rows is None else min(max_rows, num_pairs)


def lists_tokens(rows: int, num_tokens: int, top_k: int | None) -> bool:
    """Whether tokens with rows are listed, as in src/cuda/experts/metadata.hpp: of top-K routing
    (top_k None: another form) where at most half of the pairs have one of the `rows`."""
    return top_k is not None and 0 < top_k <= 16 and 2 * rows <= num_tokens * top_k


def row_lists_bytes(device: torch.device, rows: int, num_experts: int, listed_tokens: int) -> int:
    """Bytes of row lists, as sonicmoe::moe_row_lists_bytes (for symbolic T). listed_tokens: T of a
    deterministic call that lists_tokens(), else 0."""
    if device.type != "cuda":
        return 0
    tiles = (rows + 127) // 128 + num_experts
    sizes = [16 * tiles, 16 * num_experts, 4, 8, 4 * rows]
    if listed_tokens:
        sizes += [4 * listed_tokens, 8]
    return sum((size + 127) // 128 * 128 for size in sizes)


# From this many bytes of H on, backward is three operators and H goes after the first. Below, one:
# each costs host time, and of small layers the most memory in use is elsewhere.
STEPS_FROM_BYTES = 16 << 20


def in_steps(h: torch.Tensor) -> bool:
    """Whether backward takes three operators. Always where a number of tokens is symbolic."""
    elements = h.numel()
    return not isinstance(elements, int) or elements * h.element_size() >= STEPS_FROM_BYTES


def metadata_bytes(form: int, num_tokens: int, num_pairs: int, rows: int, num_experts: int) -> int:
    """Bytes of routing metadata, as sonicmoe::moe_metadata_bytes (for symbolic T)."""
    if form == FORM_SORTED:
        return 4 * num_experts
    if form == FORM_TOP_K:
        return 4 * (num_experts + num_pairs + 2 * rows)
    return 4 * (num_experts + 2 * num_pairs + 2 * rows + num_tokens + 1)
