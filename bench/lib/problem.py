"""The shapes of bench/problems.json, and one layer's tensors."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from bench.lib.record import REPOSITORY

MIB, GIB = 1 << 20, 1 << 30


def known_suites() -> dict[str, dict]:
    return json.loads((REPOSITORY / "bench" / "problems.json").read_text())["suites"]


def suite_entries(suites: list[str], names: list[str] | None = None) -> list[dict]:
    """Problems of these suites, of these names only if any are given."""
    known = known_suites()
    entries = [entry for suite in suites for entry in known[suite]["problems"]]
    return [entry for entry in entries if not names or entry["name"] in names]


def shape_named(name: str) -> tuple[int, int, int, int, int]:
    (entry,) = suite_entries(list(known_suites()), [name])
    return tuple(entry["shape"])


def problem_named(name: str, **more) -> Problem:
    return Problem(name, shape_named(name), **more)


class Problem:
    """Parameters and inputs of one shape, shared by all systems. Magnitudes are those of a trained
    layer: H and outputs of order 1."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int, int, int],  # T, d, n, E, K
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        tokens, d, n, experts, _ = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, deviation: float = 1.0) -> torch.Tensor:
            values = torch.empty(size, device=device, dtype=dtype)
            return values.normal_(0, deviation, generator=generator)

        self.x = normal(tokens, d).requires_grad_()
        self.router = normal(experts, d, deviation=d**-0.5).requires_grad_()
        self.w1 = normal(experts, 2 * n, d, deviation=d**-0.5).requires_grad_()
        self.w2 = normal(experts, d, n, deviation=n**-0.5).requires_grad_()
        self.grad = normal(tokens, d)

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.router, self.w1, self.w2

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(("T", "d", "n", "E", "K"), self.shape, strict=True))

    @property
    def flops(self) -> float:
        """Model FLOPs of a forward pass; backward has twice as many."""
        tokens, d, n, _, top_k = self.shape
        return 6.0 * tokens * top_k * n * d

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One routing for every system: ids [T, K] and weights [T, K] float32."""
        with torch.no_grad():
            values, ids = F.linear(self.x, self.router).float().topk(self.shape[4], dim=-1)
        return ids, values.softmax(-1)
