"""The experts of one layer, spread over the ranks of a context: transport "nvlink".

Ranks read each other's memory (docs/design/exchange.md): GPUs of one host through NVLink or PCIe,
processes of one host on a CPU. Forward and backward are an operator each, a whole exchange: nothing
in shared memory outlives one, and sizes follow from shapes alone.
"""

import math
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._convert import autocast, flat, matrix, needs_backward
from .._ep_moe import NUM_PLACES
from .._library import backends, ops, run
from .._rules import refuse
from ..options import packed_experts
from .peers import Peers, agreed, everyone, map_files, map_ipc, map_symmetric, tried

MOST_RANKS = 32


@dataclass(eq=False)
class Exchange:
    """One rank's end: a number of the library's, the sizes that all ranks share, the memory, and
    how many contexts use it."""

    handle: int
    num_ranks: int
    max_tokens: int
    peers: Peers
    device: torch.device
    users: int = 0

    @property
    def num_places(self) -> int:
        """Rows that a rank has places for: the tokens of all ranks."""
        return self.num_ranks * self.max_tokens

    def check(self) -> None:
        """RuntimeError that says who waited for whom, where a call of this rank gave up."""
        ops.exchange_check(self.handle)


# By what they were made of. The memory stays until close(): nodes of autograd have but the number.
_OPEN: dict[tuple, Exchange] = {}


def open_exchange(context: Any, device: torch.device, timeout_seconds: float | None) -> Exchange:
    """One for all contexts of a group that agree in everything. Collective."""
    if timeout_seconds is None:  # of which the library reads the variable itself
        timeout_seconds = -1.0
    group, tokens = context.group, context.max_tokens
    sizes = [context.size, tokens, context.hidden_size, context.num_experts, context.top_k]
    place = dist.group.WORLD if group is None else group
    key = (place, *sizes, context.dtype, device, timeout_seconds)
    exchange = _OPEN.get(key)
    if exchange is not None and tried(group, exchange.check)[1]:  # a call gave up: it was the last
        _OPEN[(*key, exchange.handle)] = exchange
        exchange = None
    if exchange is None:
        exchange = _new(group, context.rank, sizes, context.dtype, device, timeout_seconds)
        _OPEN[key] = exchange
    exchange.users += 1
    return exchange


def _new(
    group: Any,
    rank: int,
    sizes: list[int],
    dtype: torch.dtype,
    device: torch.device,
    timeout: float,
) -> Exchange:
    like = torch.empty(1, dtype=dtype, device=device)
    peers = _map(group, ops.exchange_bytes(like, sizes), device)
    handle = agreed(group, lambda: ops.exchange_open(like, sizes, rank, peers.addresses, timeout))
    # Every rank has answered, so every header is clear before the first call.
    num_ranks, max_tokens = sizes[:2]
    NUM_PLACES[handle] = num_ranks * max_tokens
    return Exchange(handle, num_ranks, max_tokens, peers, device)


def close_exchange(exchange: Exchange) -> None:
    """By the last context. Collective is the caller's part: no rank may still read this one's
    memory."""
    exchange.users -= 1
    if exchange.users == 0:
        ops.exchange_close(exchange.handle)
        del NUM_PLACES[exchange.handle]
        for key in [key for key, open_one in _OPEN.items() if open_one is exchange]:
            del _OPEN[key]


def _map(group: Any, size: int, device: torch.device) -> Peers:
    if device.type == "cpu":
        return map_files(group, size)
    devices = everyone(group, str(torch.cuda.get_device_properties(device).uuid))
    if len(set(devices)) == len(devices):  # symmetric memory wants a GPU for each rank
        peers, error = tried(group, lambda: map_symmetric(group, size, device))
        if not error:
            return peers
    return map_ipc(group, size, device)


def reason_against(context: Any, device: torch.device) -> str:
    """Why the ranks cannot exchange this way, or "". Collective; the same on every rank."""
    own = ""
    if context.max_tokens is None or context.top_k is None:
        own = "max_tokens or top_k is None"
    elif context.size > MOST_RANKS:
        own = f"{context.size} ranks, more than {MOST_RANKS}"
    elif device.type == "cuda":
        cuda = next((b for b in backends() if b.name == "cuda"), None)
        if cuda is None or not cuda.available:
            own = f"no CUDA backend: {'not built' if cuda is None else cuda.reason}"
        elif context.dtype != torch.bfloat16:
            own = f"dtype {context.dtype}, not bfloat16"
        elif context.hidden_size % 8 != 0:
            own = f"hidden_size {context.hidden_size}, no multiple of 8"
    elif device.type != "cpu":
        own = f"device {device.type}"
    theirs = everyone(context.group, (own, _host(), device.type))
    if len({host for _, host, _ in theirs}) > 1:
        return "ranks on several hosts"
    if len({kind for _, _, kind in theirs}) > 1:
        return "ranks on CPUs and on GPUs"
    return next((reason for reason, _, _ in theirs if reason), "")


def _host() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return socket.gethostname() + file.read()
    except OSError:
        return socket.gethostname()


def tell(transport: str, reason: str) -> None:
    """The choice, under SONICMOE_LOG=dispatch."""
    if os.environ.get("SONICMOE_LOG") == "dispatch":
        print(f"sonicmoe: dispatch: Context -> {transport} ({reason})", file=sys.stderr)


def exchanged(
    operation: str,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    exchange: Exchange,
    max_rows: int | None,
    keep_received: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """y, of the shape of x, and rows_dropped [1], or empty without max_rows."""
    if x.device != exchange.device:
        refuse(operation, "x", f"a tensor on {exchange.device}", f"one on {x.device}")
    if options.get("workspace_limit") is not None:
        refuse(operation, "workspace_limit", "None in an exchange", options["workspace_limit"])
    if math.prod(x.shape[:-1]) > exchange.max_tokens:
        refuse(operation, "x", f"at most {exchange.max_tokens} tokens", math.prod(x.shape[:-1]))
    packed = packed_experts(operation, **options, max_rows=max_rows)
    shape, (w1, w2, b1, b2) = x.shape, experts
    x, w1, w2, b1, b2 = autocast(operation, matrix(operation, "x", x), w1, w2, b1, b2)
    ids, weights = flat(topk_ids).contiguous(), flat(topk_weights).contiguous()
    save = needs_backward(x, w1, w2, b1, b2, weights)
    y, _, _, _, dropped = run(
        ops.ep_moe_forward, x, exchange.handle, ids, weights, w1, b1, w2, b2, *packed, save,
        save and keep_received,
    )  # fmt: skip
    return y.reshape(shape), dropped
