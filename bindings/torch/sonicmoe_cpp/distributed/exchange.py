"""The experts of one layer, spread over the ranks of a context: transport "gather".

    xa, ids, weights = those of all ranks                                    [size T, ...]
    parts = moe(xa, own w1, own w2, ids, weights, first_expert, max_rows)    [size T, d]
    y     = the sum over the ranks of their parts of the own tokens          [T, d]

A token's row crosses to each other rank once, whatever K is. Every slot has one owner, so gradients
of weights, biases and routing weights are bit for bit those of one process with the tokens of all
ranks, in rank order; y and x's gradient differ by one rounding of each rank's part.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._checks import check_leading, check_shape, check_tensors, refuse
from .._convert import flat
from .._rules import Name, Number
from .collectives import Gather, GatherRouting, SumParts, all_gather
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
    """
    operation = "distributed.moe"
    check_tensors(operation, x=x, topk_ids=topk_ids, topk_weights=topk_weights, w1=w1, w2=w2)
    check_leading(operation, x=x, topk_ids=topk_ids, topk_weights=topk_weights)
    if topk_ids.shape[-1] != context.top_k or topk_weights.shape != topk_ids.shape:
        shapes = f"shapes {list(topk_ids.shape)} and {list(topk_weights.shape)}"
        expected = f"[..., {context.top_k}], as topk_weights"
        refuse(operation, "topk_ids", expected, shapes)
    _check(operation, x, w1, context, row_capacity, on_overflow, options)
    weights, ids = GatherRouting.apply(
        flat(topk_weights), context.group, context.size, flat(topk_ids)
    )
    routing = {"topk_ids": ids, "topk_weights": weights}
    own = flat(topk_ids).numel()
    return _exchange(
        operation, x, routing, (w1, w2, b1, b2), context, own, row_capacity, keep_received,
        on_overflow, options,
    )  # fmt: skip


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
    _check(operation, x, w1, context, row_capacity, on_overflow, options)
    tokens = math.prod(x.shape[:-1])
    own = (token_ids >= 0) & (token_ids < tokens)
    placed = torch.where(own, token_ids + context.rank * tokens, -1)
    weights, placed, ids = GatherRouting.apply(
        pair_weights, context.group, context.size, placed, expert_ids
    )
    routing = {"token_ids": placed, "expert_ids": ids, "pair_weights": weights}
    return _exchange(
        operation, x, routing, (w1, w2, b1, b2), context, token_ids.numel(), row_capacity,
        keep_received, on_overflow, options,
    )  # fmt: skip


def _check(
    operation: str,
    x: Tensor,
    w1: Tensor,
    context: Context,
    row_capacity: float | None,
    on_overflow: str,
    options: dict[str, Any],
) -> None:
    """Before the first collective, in which the other ranks would wait."""
    if w1.shape[0] != context.local_experts:
        expected = f"the {context.local_experts} experts of a rank"
        refuse(operation, "w1", expected, f"shape {list(w1.shape)}")
    if x.shape[-1] != context.hidden_size:
        refuse(operation, "x", f"[..., {context.hidden_size}]", f"shape {list(x.shape)}")
    ON_OVERFLOW.check(operation, "on_overflow", on_overflow)
    if options.get("zero_absent_tokens") is False:
        refuse(operation, "zero_absent_tokens", "True, as all ranks' parts are summed", False)
    if row_capacity is None:
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured:
            expected = "a number under torch.compile and in CUDA graphs (1.25 is a good start)"
            refuse(operation, "row_capacity", expected, None)
    elif not Number().check(operation, "row_capacity", row_capacity) > 0:
        refuse(operation, "row_capacity", "a positive number or None", row_capacity)
    context.check_tokens(operation, math.prod(x.shape[:-1]))


def _exchange(
    operation: str,
    x: Tensor,
    routing: dict[str, Any],
    experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    context: Context,
    own: int,
    row_capacity: float | None,
    keep_received: bool | None,
    on_overflow: str,
    options: dict[str, Any],
) -> Tensor:
    w1, w2, b1, b2 = experts
    raises, tokens = on_overflow == "raise", flat(x)
    is_list = "expert_ids" in routing
    max_rows = _max_rows(
        row_capacity, own, routing["expert_ids" if is_list else "topk_ids"], context
    )
    received = Gather.apply(tokens, context.group, context.size)
    dropped = context.count_on(x.device)
    if raises:
        dropped = torch.zeros_like(dropped)
    function = functional.moe_pairs if is_list else functional.moe
    with _gathered_again(received, tokens, context, keep_received):
        parts = function(
            received, w1, w2, **routing, b1=b1, b2=b2, first_expert=context.first_expert,
            max_rows=max_rows, rows_dropped=dropped, **options,
        )  # fmt: skip
    if raises:  # on every rank, or the others would wait for those that raise
        beyond = all_gather(dropped, context.group).tolist()
        worst = max(beyond)
        if worst > 0:
            expected = f"room for {max_rows + worst} rows on rank {beyond.index(worst)}"
            refuse(operation, "row_capacity", expected, f"{max_rows} rows")
    return SumParts.apply(parts, context.group, context.size).reshape(x.shape)


def _max_rows(capacity: float | None, own: int, ids: Tensor, context: Context) -> int:
    """Rows of this rank: by the capacity, or counted. `own` slots come from every rank."""
    if capacity is not None:
        rows = math.ceil(capacity * own)
        return min(-(-rows // ROUND_ROWS_TO) * ROUND_ROWS_TO, ids.numel())
    first = context.first_expert
    return int(((ids >= first) & (ids < first + context.local_experts)).sum())


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
