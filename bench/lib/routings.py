"""Routings of chosen skew: ids [T, K] int32 with K distinct experts per token.

Where experts are unequal, expert 0 has the most rows; `shuffled` hides that from the kernels.
"""

from __future__ import annotations

import torch


def balanced_ids(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """Every expert gets exactly T*K/E rows. In each block of E tokens slot k of token t takes
    expert t + shift_k mod E, with shifts that differ; then the tokens are shuffled."""
    if tokens % experts:
        raise ValueError(f"balanced_ids: {tokens} tokens are no multiple of {experts} experts")
    device = generator.device
    draws = torch.rand(tokens // experts, experts, generator=generator, device=device)
    shifts = draws.topk(top_k).indices[:, None, :]
    ids = (torch.arange(experts, device=device)[None, :, None] + shifts) % experts
    order = torch.randperm(tokens, generator=generator, device=device)
    return ids.reshape(tokens, top_k)[order].int()


def uniform_ids(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """Each token draws K distinct experts, all equally likely."""
    return _scores(tokens, experts, generator).topk(top_k).indices.int()


def zipf_ids(
    tokens: int, experts: int, top_k: int, generator: torch.Generator, exponent: float = 1.0
) -> torch.Tensor:
    """Each token draws K distinct experts one after another, with odds of 1 / (e + 1)^exponent
    among those left: the largest of log(odds) plus Gumbel noise."""
    noise = -(-_scores(tokens, experts, generator).log()).log()
    ranks = torch.arange(1, experts + 1, device=generator.device)
    return (noise - exponent * ranks.log()).topk(top_k).indices.int()


def hot_expert_ids(
    tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Expert 0 is chosen by every token; the other slots are uniform."""
    scores = _scores(tokens, experts, generator)
    scores[:, 0] = 2.0
    return scores.topk(top_k).indices.int()


def shuffled(ids: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """The same routing with the experts renamed at random."""
    names = torch.randperm(experts, generator=generator, device=ids.device, dtype=torch.int32)
    return names[ids.long()]


def rows_per_expert(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.bincount(ids.reshape(-1).long(), minlength=experts)


def padded_rows(rows: torch.Tensor, tile: int) -> int:
    """Rows in all, with every expert's count rounded up to a multiple of `tile`."""
    return int(((rows.long() + tile - 1) // tile * tile).sum())


def _scores(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform on [0, 1): [T, E] float32."""
    return torch.rand(tokens, experts, generator=generator, device=generator.device)
