"""Token rounding of a group: the counts of all ranks together become multiples of the tile.

    F[e]       = sum over the ranks of f[r, e], the rows that token choice gave      [E]
    F'[e]      = F[e] rounded by the policy, for the tokens of all ranks
    f'[r, e]   = f[r, e] plus rank r's share of F'[e] - F[e]

A share is in proportion to the rank's count: the largest remainders take what is left, ties go by
(r - e) mod size. No rank takes more than it has tokens for; the others then share the rest.
"""

from typing import Any

import torch
from torch import Tensor

from .._rules import refuse
from ..options import RoundingOptions
from .collectives import all_gather

POLICIES = ("nearest", "up", "down")


def check_policy(operation: str, rounding: RoundingOptions) -> None:
    """The other policies need more than the sums of counts."""
    if rounding.policy not in POLICIES:
        expected = f'one of {", ".join(POLICIES)} with rounding="group"'
        refuse(operation, "policy", expected, rounding.policy)


def own_targets(
    rows: Tensor, num_tokens: int, rounding: RoundingOptions, group: Any, rank: int
) -> Tensor:
    """f' of this rank [E] int32, from its f. Collective; nothing waits for the GPU."""
    counts = all_gather(rows[None], group).long()
    return shared_targets(counts, num_tokens, rounding)[rank].int()


def shared_targets(counts: Tensor, num_tokens: int, rounding: RoundingOptions) -> Tensor:
    """f' [size, E] of all ranks, from f; each has num_tokens."""
    total = counts.sum(0)
    change = _rounded(total, num_tokens * counts.shape[0], rounding) - total
    adds = change > 0
    room = torch.where(adds, num_tokens - counts, counts)
    share = torch.minimum(_split(change.abs(), counts), room)
    share = share + _split(change.abs() - share.sum(0), room - share)
    return counts + torch.where(adds, share, -share)


def _rounded(total: Tensor, num_tokens: int, rounding: RoundingOptions) -> Tensor:
    """As src/math/rounding.hpp."""
    tile = rounding.tile
    above = total % tile
    low = total - above
    if rounding.policy == "down":
        return low
    if rounding.policy == "up":
        up = above > 0
    else:
        tie_is_up = (2 * above == tile) & (low // tile % 2 == 1)
        up = (2 * above > tile) | tie_is_up
    return low + tile * (up & (low + tile <= num_tokens))


def _split(amount: Tensor, weights: Tensor) -> Tensor:
    """amount [E] in parts [size, E] in proportion to weights: largest remainders first."""
    size, num_experts = weights.shape
    total = weights.sum(0).clamp(min=1)
    product = amount * weights
    parts, remainder = product // total, product % total
    ranks = torch.arange(size, device=weights.device)[:, None]
    later = (ranks - torch.arange(num_experts, device=weights.device)) % size
    order = remainder * size + (size - 1 - later)  # no two of an expert are equal
    place = order.argsort(0, descending=True).argsort(0)
    return parts + (place < amount - parts.sum(0))
