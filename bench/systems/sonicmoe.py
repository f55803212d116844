"""This library, through its Python package."""

from __future__ import annotations

import inspect

import torch

from bench.lib.problem import Problem


class SonicMoE:
    """Options are keywords of moe and moe_layer. All else goes by position: builds of several
    versions, whose names differ, are compared with each other."""

    profiled = True

    def __init__(self, name: str, replayed: bool = False, **options) -> None:
        self.name, self.replayed, self.options = name, replayed, options

    @property
    def lacking(self) -> str | None:
        import sonicmoe_cpp

        known = inspect.signature(sonicmoe_cpp.moe).parameters
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return None
        unknown = [key for key in self.options if key not in known]
        return f"sonicmoe_cpp does not know {', '.join(unknown)}" if unknown else None

    def experts(self, p: Problem, ids, weights) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe(p.x, p.w1, p.w2, ids, weights, **self.options)

    def layer(self, p: Problem) -> torch.Tensor:
        import sonicmoe_cpp

        return sonicmoe_cpp.moe_layer(
            p.x, p.router, p.w1, p.w2, p.shape[4], scoring="topk_softmax", **self.options
        )[0]
