"""The official layer, where its package sonic-moe is installed."""

from __future__ import annotations

import importlib.util

import torch

from bench.lib.problem import Problem


class OfficialSonicMoE:
    """The official CuTe-DSL layer, where its package sonic-moe is installed. It takes gate and up
    in alternating rows of w1, so it computes another function of the same random weights: its
    errors are not measured. Its first call at a shape compiles and tunes (QUACK_CACHE_DIR keeps
    what it finds)."""

    name = "sonic-moe"
    profiled = replayed = True

    @property
    def lacking(self) -> str | None:
        found = importlib.util.find_spec("sonicmoe")
        return None if found else "the package sonic-moe is not installed"

    def layer(self, p: Problem) -> torch.Tensor:
        from sonicmoe import moe_TC_softmax_topk_layer

        w1, w2 = (w.permute(1, 2, 0) for w in (p.w1, p.w2))
        stream = torch.cuda.current_stream().cuda_stream
        top_k = p.shape[4]
        return moe_TC_softmax_topk_layer(p.x, p.router, w1, None, w2, None, top_k, stream)[0]
