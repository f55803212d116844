"""float64 values on samples, by which the GPU benchmarks judge a system's error."""

from __future__ import annotations

import torch

from bench.lib.problem import Problem

SAMPLED_TOKENS = 64
SAMPLED_COLUMNS = 64


def relative(error: torch.Tensor, exact: torch.Tensor) -> float:
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


class Oracle:
    """float64 values of y and dx for some tokens, of dw1 and dw2 for some rows of one expert."""

    def __init__(self, p: Problem, ids: torch.Tensor, weights: torch.Tensor) -> None:
        tokens, d, n, experts, _ = p.shape
        self.tokens = torch.linspace(0, tokens - 1, SAMPLED_TOKENS, device="cuda").long()
        self.columns = torch.linspace(0, n - 1, SAMPLED_COLUMNS, device="cuda").long()
        self.outputs = torch.linspace(0, d - 1, SAMPLED_COLUMNS, device="cuda").long()
        self.expert = experts - 1
        rows = [self._row(p, t, ids, weights) for t in self.tokens.tolist()]
        self.y, self.dx = (torch.stack(column) for column in zip(*rows, strict=True))
        self.dw1, self.dw2 = self._weight_gradients(p, ids, weights)

    @staticmethod
    def _row(p: Problem, token: int, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
        x, grad = p.x[token].detach().double(), p.grad[token].double()
        y, dx = torch.zeros_like(x), torch.zeros_like(x)
        for slot, e in enumerate(ids[token].tolist()):
            w1, w2 = p.w1[e].detach().double(), p.w2[e].detach().double()
            gate, up = (w1 @ x).chunk(2)
            s, sigmoid = weights[token, slot].double(), gate.sigmoid()
            y += s * (w2 @ (gate * sigmoid * up))
            da = s * (w2.T @ grad)
            d_gate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
            dx += w1.T @ torch.cat([d_gate, da * gate * sigmoid])
        return y, dx

    def _weight_gradients(self, p: Problem, ids, weights) -> tuple[torch.Tensor, torch.Tensor]:
        """dw1 [columns of gate and up, d] and dw2 [outputs, columns] of one expert."""
        n, e, c = p.shape[2], self.expert, self.columns
        token, slot = (ids == e).nonzero(as_tuple=True)
        x, grad = p.x[token].detach().double(), p.grad[token].double()
        s = weights[token, slot].double()[:, None]
        gate, up = x @ p.w1[e, c].detach().double().T, x @ p.w1[e, n + c].detach().double().T
        sigmoid = gate.sigmoid()
        da = s * (grad @ p.w2[e][:, c].detach().double())
        d_gate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
        dw1 = torch.cat([d_gate, da * gate * sigmoid], 1).T @ x
        return dw1, grad[:, self.outputs].T @ (s * gate * sigmoid * up)

    def errors(self, p: Problem, system, ids, weights) -> dict[str, float]:
        y = system.experts(p, ids, weights)
        dx, dw1, dw2 = torch.autograd.grad(y, (p.x, p.w1, p.w2), p.grad)
        n, e, c = p.shape[2], self.expert, self.columns
        ours = {
            "y": (y.detach()[self.tokens], self.y),
            "dx": (dx[self.tokens], self.dx),
            "dw1": (dw1[e, torch.cat([c, n + c])], self.dw1),
            "dw2": (dw2[e][self.outputs][:, c], self.dw2),
        }
        return {name: relative(a.double() - b, b) for name, (a, b) in ours.items()}
