"""The experts of one layer, spread over the ranks of a context: transport "gather", or by name
"nvlink" (nvlink.py).

    xa, ids, weights = those of all ranks                                    [size T, ...]
    parts = moe(xa, own w1, own w2, ids, weights, first_expert, max_rows)    [size T, d]
    y     = the sum over the ranks of their parts of the own tokens          [T, d]

A token's row crosses to each other rank once, whatever K is. Every slot has one owner, so gradients
of weights, biases and routing weights are bit for bit those of one process with the tokens of all
ranks, in rank order; y and x's gradient differ by one rounding of each rank's part.

Where all ranks have the same tokens xa is x, and the sum of the parts goes to every rank.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional
from .._checks import check_leading, check_shape, check_tensors, refuse
from .._convert import flat
from .._rules import FLAG, Name, Number
from . import nvlink
from .collectives import (
    Gather,
    GatherRouting,
    Shared,
    SumParts,
    SumShared,
    all_gather,
    first,
    most,
    padded,
)
from .context import Context

ON_OVERFLOW = Name({"count": 0, "raise": 1})
ROUND_ROWS_TO = 128  # rows of a tile


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    context: Context,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
    on_overflow: str = "count",
    equal_tokens: bool = True,
    shared_tokens: bool = False,
    **options: Any,
) -> Tensor:
    """`moe` with the experts of all ranks: out[t] = sum_k topk_weights[t, k] * expert(x[t]).

    x [..., d] are the tokens of this rank, as many on every rank; topk_ids [..., K] name experts of
    all ranks; w1 [E / size, g*n, d], w2, b1, b2 are those of this rank. Collective, forward and
    backward. Other options are those of `sonicmoe_cpp.moe`.

    row_capacity c: H and all scratch have room for c T K rows, rounded up to tiles of 128; rows
    beyond are dropped and counted in `context.rows_dropped`, or with on_overflow="raise" an error
    on every rank, for which each call waits for the GPU. None: as many rows as there are, for which
    each call waits for the GPU too; torch.compile and CUDA graphs need a number.

    keep_received False: the gathered tokens are not kept for backward, which gathers them again.
    None keeps them through "gather" and fetches them again through "nvlink".

    Through "nvlink" ranks may always have other numbers of tokens, and T of row_capacity is the
    context's max_tokens.

    equal_tokens False: ranks may have other numbers of tokens. Each call then asks for the largest,
    waits for the GPU, and fills up with dropped slots.

    shared_tokens True: every rank has the same tokens and routing, as behind tensor-parallel
    attention. Nothing is gathered; every rank gets the whole sum, and the whole gradients of x and
    topk_weights, for a gradient of y that is the same on all. Without row_capacity nothing waits
    where no gradient is asked for, nor under torch.compile and CUDA graphs: H then has T K rows.
    """
    operation = "distributed.moe"
    check_tensors(operation, x=x, topk_ids=topk_ids, topk_weights=topk_weights, w1=w1, w2=w2)
    check_leading(operation, x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    slots = topk_ids.shape[-1] if context.top_k is None else context.top_k
    if topk_ids.shape[-1] != slots or topk_weights.shape != topk_ids.shape:
        shapes = f"shapes {list(topk_ids.shape)} and {list(topk_weights.shape)}"
        expected = f"[..., {slots}], as topk_weights"
        refuse(operation, "topk_ids", expected, shapes)
    given = _Given(
        operation, context, row_capacity, keep_received, on_overflow,
        FLAG.check(operation, "equal_tokens", equal_tokens) or shared_tokens,
        FLAG.check(operation, "shared_tokens", shared_tokens), options,
    )  # fmt: skip
    given.check(x, w1)
    if context.exchange is not None:
        return _one_sided(given, context.exchange, x, topk_ids, topk_weights, (w1, w2, b1, b2))
    group, size = context.group, context.size
    tokens, ids, weights = flat(x), flat(topk_ids), flat(topk_weights)
    count = tokens.shape[0]
    if not given.equal_tokens:
        rows = most(count, x.device, group)
        tokens, weights = padded(tokens, rows), padded(weights, rows)
        ids = padded(ids, rows, -1)
    own = ids.numel() // size if shared_tokens else ids.numel()
    if shared_tokens:
        weights = Shared.apply(weights, group, size)
    else:
        weights, ids = GatherRouting.apply(weights, group, size, ids)
    routing = {"topk_ids": ids, "topk_weights": weights}
    y = first(_exchange(given, tokens, routing, (w1, w2, b1, b2), own), count)
    return y if y.shape == x.shape else y.reshape(x.shape)


def moe_pairs(
    x: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    pair_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    context: Context,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
    on_overflow: str = "count",
    **options: Any,
) -> Tensor:
    """`moe_pairs` with the experts of all ranks; token_ids count the tokens of this rank, and every
    rank has a list as long. row_capacity counts in pairs of the list; all else as in `moe`."""
    operation = "distributed.moe_pairs"
    check_tensors(
        operation, x=x, token_ids=token_ids, expert_ids=expert_ids, pair_weights=pair_weights,
        w1=w1, w2=w2,
    )  # fmt: skip
    for name, tensor in (("expert_ids", expert_ids), ("pair_weights", pair_weights)):
        check_shape(operation, name, tensor, *token_ids.shape)
    given = _Given(
        operation, context, row_capacity, keep_received, on_overflow, True, False, options
    )
    given.check(x, w1)
    if context.exchange is not None:
        refuse(operation, "context", 'transport "gather" for lists of pairs', "nvlink")
    tokens = math.prod(x.shape[:-1])
    own = (token_ids >= 0) & (token_ids < tokens)
    placed = torch.where(own, token_ids + context.rank * tokens, -1)
    weights, placed, ids = GatherRouting.apply(
        pair_weights, context.group, context.size, placed, expert_ids
    )
    routing = {"token_ids": placed, "expert_ids": ids, "pair_weights": weights}
    y = _exchange(given, flat(x), routing, (w1, w2, b1, b2), token_ids.numel())
    return y if y.shape == x.shape else y.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What a call says about its exchange, and the options of its experts."""

    operation: str
    context: Context
    row_capacity: float | None
    keep_received: bool | None
    on_overflow: str
    equal_tokens: bool
    shared_tokens: bool
    options: dict[str, Any]

    def check(self, x: Tensor, w1: Tensor) -> None:
        """Before the first collective, in which the other ranks would wait."""
        operation, context = self.operation, self.context
        if w1.shape[0] != context.local_experts:
            expected = f"the {context.local_experts} experts of a rank"
            refuse(operation, "w1", expected, f"shape {list(w1.shape)}")
        if x.shape[-1] != context.hidden_size:
            refuse(operation, "x", f"[..., {context.hidden_size}]", f"shape {list(x.shape)}")
        ON_OVERFLOW.check(operation, "on_overflow", self.on_overflow)
        if self.options.get("zero_absent_tokens") is False:
            refuse(operation, "zero_absent_tokens", "True, as all ranks' parts are summed", False)
        if not self.equal_tokens and _static(x):
            expected = "True under torch.compile and in CUDA graphs"
            refuse(operation, "equal_tokens", expected, False)
        if self.row_capacity is None:
            if _static(x) and not self.shared_tokens:
                expected = "a number under torch.compile and in CUDA graphs (1.25 is a good start)"
                refuse(operation, "row_capacity", expected, None)
        elif not Number().check(operation, "row_capacity", self.row_capacity) > 0:
            refuse(operation, "row_capacity", "a positive number or None", self.row_capacity)
        equal = self.equal_tokens and context.exchange is None
        context.check_tokens(operation, math.prod(x.shape[:-1]), equal)

    def max_rows(self, own: int, ids: Tensor) -> int | None:
        """Rows of this rank: by the capacity, or counted. `own` slots are a rank's share."""
        if self.row_capacity is not None:
            rows = math.ceil(self.row_capacity * own)
            return min(-(-rows // ROUND_ROWS_TO) * ROUND_ROWS_TO, ids.numel())
        if self.shared_tokens and (_static(ids) or not torch.is_grad_enabled()):
            return None
        first = self.context.first_expert
        return int(((ids >= first) & (ids < first + self.context.local_experts)).sum())


def _static(tensor: Tensor) -> bool:
    """Whether nothing may wait for the GPU."""
    captured = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or captured


def _exchange(
    given: _Given,
    tokens: Tensor,
    routing: dict[str, Any],
    experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    own: int,
) -> Tensor:
    """Of tokens [T, d], as many on every rank. routing is that of all ranks."""
    context, (w1, w2, b1, b2) = given.context, experts
    group, size = context.group, context.size
    raises = given.on_overflow == "raise"
    is_list = "expert_ids" in routing
    max_rows = given.max_rows(own, routing["expert_ids" if is_list else "topk_ids"])
    dropped = context.count_on(tokens.device)
    if raises:
        dropped = torch.zeros_like(dropped)
    function = functional.moe_pairs if is_list else functional.moe
    received = (Shared if given.shared_tokens else Gather).apply(tokens, group, size)
    keep = None if given.shared_tokens else given.keep_received
    with _gathered_again(received, tokens, context, keep):
        parts = function(
            received, w1, w2, **routing, b1=b1, b2=b2, first_expert=context.first_expert,
            max_rows=max_rows, rows_dropped=dropped if max_rows is not None else None,
            **given.options,
        )  # fmt: skip
    if raises and max_rows is not None:
        _raise_overflow(given.operation, dropped, max_rows, context)
    return (SumShared if given.shared_tokens else SumParts).apply(parts, group, size)


def _one_sided(
    given: _Given,
    exchange: nvlink.Exchange,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> Tensor:
    """Through transport "nvlink"."""
    context = given.context
    if given.shared_tokens:
        refuse(given.operation, "shared_tokens", 'False through transport "nvlink"', True)
    slots = exchange.num_places * topk_ids.shape[-1]
    if given.row_capacity is None:
        max_rows = _counted_rows(topk_ids, context)
    else:
        rows = math.ceil(given.row_capacity * slots / context.size)
        max_rows = min(-(-rows // ROUND_ROWS_TO) * ROUND_ROWS_TO, slots)
    y, dropped = nvlink.exchanged(
        given.operation, x, topk_ids, topk_weights, experts, exchange, max_rows,
        given.keep_received is True, given.options,
    )  # fmt: skip
    if given.on_overflow == "raise":
        _raise_overflow(given.operation, dropped, max_rows, context)
    else:
        context.count_on(x.device).add_(dropped)
    return y


def _counted_rows(ids: Tensor, context: Context) -> int:
    """Rows of this rank, from the ids of all. Waits for the GPU."""
    owners = ids[(ids >= 0) & (ids < context.num_experts)] // context.local_experts
    counts = torch.bincount(owners.flatten(), minlength=context.size)
    dist.all_reduce(counts, group=context.group)
    return int(counts[context.rank])


def _raise_overflow(operation: str, dropped: Tensor, max_rows: int, context: Context) -> None:
    """On every rank, or the others would wait for those that raise."""
    beyond = torch.zeros(context.size, dtype=torch.int32, device=dropped.device)
    beyond[context.rank] = dropped[0]
    dist.all_reduce(beyond, group=context.group)
    worst = int(beyond.max())
    if worst > 0:
        expected = f"room for {max_rows + worst} rows on rank {beyond.tolist().index(worst)}"
        refuse(operation, "row_capacity", expected, f"{max_rows} rows")


@contextlib.contextmanager
def _gathered_again(
    received: Tensor, tokens: Tensor, context: Context, keep_received: bool | None
) -> Iterator[None]:
    """Within, `received` is not saved for backward, which gathers `tokens` once more."""
    if keep_received is not False or not torch.is_grad_enabled():
        yield
        return
    place = received.data_ptr()
    own = tokens.detach()

    def pack(tensor: Tensor) -> Any:
        is_received = tensor.data_ptr() == place and tensor.shape == received.shape
        return own if is_received else (tensor,)

    def unpack(kept: Any) -> Tensor:
        return kept[0] if isinstance(kept, tuple) else all_gather(kept, context.group)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
