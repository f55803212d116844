"""Every public operation with legal arguments of any size, and the form of every refusal."""

import re
from collections.abc import Callable
from typing import NamedTuple

import sonicmoe_cpp as sm
import torch
from sonicmoe_cpp.functional import router_logits
from torch import Tensor


def sizes(generator) -> dict[str, int]:
    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    experts = 2 * pick(1, 3)
    return {"T": pick(4, 9), "d": pick(2, 9), "n": pick(1, 6), "E": experts, "K": pick(1, experts)}


class Maker:
    """Legal arguments by name, for the sizes and the dtype of one round."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.sizes = sizes(self.generator)

    def floats(self, *shape, dtype=None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def indices(self, high, *shape) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def make(self, name: str):
        T, d, n, E, K = (self.sizes[letter] for letter in "TdnEK")
        exact = torch.float32
        makers = {
            "x": lambda: self.floats(T, d),
            "w1": lambda: self.floats(E, 2 * n, d),
            "w2": lambda: self.floats(E, d, n),
            "b1": lambda: self.floats(E, 2 * n),
            "b2": lambda: self.floats(E, d),
            "topk_ids": lambda: self.indices(E, T, K),
            "topk_weights": lambda: self.floats(T, K),
            "offsets": lambda: self.indices(T, E).sort()[0].int(),
            "row_weights": lambda: self.floats(T),
            "token_ids": lambda: self.indices(T, 2 * T),
            "expert_ids": lambda: self.indices(E, 2 * T),
            "pair_weights": lambda: self.floats(2 * T),
            "router_weight": lambda: self.floats(E, d, dtype=exact),
            "router_bias": lambda: self.floats(E, dtype=exact),
            "logits": lambda: self.floats(T, E, dtype=exact),
            "selection_bias": lambda: self.floats(E, dtype=exact),
            "rows_per_expert": lambda: self.indices(E, T * K).bincount(minlength=E).int(),
            "top_k": lambda: K,
            "tile": lambda: 2,
            "rate": lambda: 0.1,
        }
        return makers[name]()


class Operation(NamedTuple):
    call: Callable
    tensors: tuple[str, ...]
    others: tuple[str, ...] = ()
    fixed: dict = {}
    options: tuple[str, ...] = ()

    def arguments(self, maker: Maker) -> dict:
        return {name: maker.make(name) for name in (*self.tensors, *self.others)} | self.fixed


EXPERT_OPTIONS = ("activation", "gate_up_layout", "limit", "workspace_limit")
ROUTER_OPTIONS = ("top_k", "scoring", "renormalize", "num_groups", "top_groups", "scale")
ROUNDING_OPTIONS = ("tile", "policy", "seed")
WEIGHTS = ("w1", "w2", "b1", "b2")
SIGMOID = {"scoring": "sigmoid_topk"}
ROUNDED = SIGMOID | {"router": "token_rounding", "policy": "stochastic"}
LAYER = ("x", "router_weight", *WEIGHTS, "router_bias", "selection_bias")
OPERATIONS = {
    "moe": Operation(
        sm.moe, ("x", *WEIGHTS, "topk_ids", "topk_weights"), (), {},
        (*EXPERT_OPTIONS, "deterministic"),
    ),
    "moe_sorted": Operation(
        sm.moe_sorted, ("x", *WEIGHTS, "offsets", "row_weights"), (), {}, EXPERT_OPTIONS
    ),
    "moe_pairs": Operation(
        sm.moe_pairs, ("x", *WEIGHTS, "token_ids", "expert_ids", "pair_weights"), (), {},
        (*EXPERT_OPTIONS, "deterministic"),
    ),
    "router_logits": Operation(router_logits, ("x", "router_weight", "router_bias")),
    "route": Operation(sm.route, ("logits", "selection_bias"), ("top_k",), SIGMOID, ROUTER_OPTIONS),
    "round_tokens": Operation(
        sm.round_tokens, ("logits", "selection_bias"), ("top_k", "tile"), SIGMOID,
        (*ROUTER_OPTIONS, *ROUNDING_OPTIONS),
    ),
    "load_balancing_loss": Operation(
        sm.load_balancing_loss, ("logits", "rows_per_expert"), ("top_k",), {},
        ("top_k", "scoring"),
    ),
    "router_z_loss": Operation(sm.router_z_loss, ("logits",)),
    "update_expert_bias_": Operation(
        sm.update_expert_bias_, ("selection_bias", "rows_per_expert"), ("rate",), {}, ("rate",)
    ),
    "moe_layer": Operation(sm.moe_layer, LAYER, ("top_k",), SIGMOID),
    "moe_layer, rounded": Operation(
        sm.moe_layer, LAYER, ("top_k", "tile"), ROUNDED,
        (*EXPERT_OPTIONS, *ROUTER_OPTIONS, *ROUNDING_OPTIONS, "deterministic", "router",
         "main_grad"),
    ),
}  # fmt: skip


def assert_clear(error: Exception, operation: str, argument: str | None, what: str) -> None:
    """operation: argument: expected X, got Y, on one line; `argument` None is any."""
    text = str(error)
    found = re.fullmatch(r"(\w+): (\w+): expected (.+), got (.+)", text)
    assert found, f"{what}: {text}"
    ours = ("moe", operation.rstrip("_"), "rounded_capacity")
    assert found[1].startswith(ours), f"{what}: {text}"
    if argument is not None:
        assert found[2] == argument, f"{what}: {text}"
