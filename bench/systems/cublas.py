"""cuBLAS: the dense products of the same FLOPs alone, without gather, activation or sum."""

from __future__ import annotations

import torch

from bench.lib.problem import Problem


class Products:
    """The six products alone, batched and balanced: rows = T*K/E per expert."""

    def __init__(self, p: Problem) -> None:
        tokens, d, n, experts, top_k = p.shape
        rows = max(1, tokens * top_k // experts)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=p.x.device, dtype=p.dtype)

        self.x, self.grad = normal(experts, rows, d), normal(experts, rows, d)
        self.h, self.a = normal(experts, rows, 2 * n), normal(experts, rows, n)
        self.w1, self.w2 = p.w1.detach(), p.w2.detach()
        self.scale = tokens * top_k / (rows * experts)

    def forward(self) -> None:
        torch.bmm(self.x, self.w1.mT)
        torch.bmm(self.a, self.w2.mT)

    def backward(self) -> None:
        torch.bmm(self.grad, self.w2)
        torch.bmm(self.h, self.w1)
        torch.bmm(self.grad.mT, self.a)
        torch.bmm(self.h.mT, self.x)


class Cublas:
    name = "cublas-bmm"
    products = Products
