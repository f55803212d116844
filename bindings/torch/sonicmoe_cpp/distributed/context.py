"""What the ranks of an expert-parallel group agree on, and count."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._library import __version__
from .._rules import SIZE, Integer, Name, Optional, refuse

TRANSPORTS = Name({"auto": 0, "gather": 1})


class Context:
    """An exchange between ranks that each hold num_experts / size of the experts, in rank order.

    group is a process group or a mesh of one dimension; hidden_size d, num_experts E, top_k K
    (None: what a call brings) and dtype are those of the layers that share the context; max_tokens
    bounds the tokens of a call (None: any number). transport "gather" gathers the tokens of all
    ranks and sums their partial rows through torch.distributed (NCCL, gloo); "auto" takes the best
    of this build, which is that.

    Making one is collective: the ranks compare what they were given, and a ValueError on every rank
    names the rank, the field and both values where two differ.

    `rows_dropped` [1] int32 on the device counts rows that a row_capacity left no room for, over
    all calls; None before the first call.
    """

    def __init__(
        self,
        group: Any,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        *,
        dtype: torch.dtype,
        max_tokens: int | None = None,
        transport: str = "auto",
    ) -> None:
        operation = "Context"
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                refuse(operation, "group", "a mesh of one dimension", f"{group.ndim} dimensions")
            group = group.get_group()
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.hidden_size = SIZE.check(operation, "hidden_size", hidden_size)
        self.num_experts = SIZE.check(operation, "num_experts", num_experts)
        self.top_k = Optional(Integer(1, num_experts)).check(operation, "top_k", top_k)
        self.max_tokens = Optional(SIZE).check(operation, "max_tokens", max_tokens)
        self.dtype = dtype
        self.transport = TRANSPORTS.check(operation, "transport", transport)
        self._agree()
        if num_experts % self.size != 0:
            expected = f"a multiple of the {self.size} ranks of the group"
            refuse(operation, "num_experts", expected, num_experts)
        self.rows_dropped: Tensor | None = None

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.size

    @property
    def first_expert(self) -> int:
        return self.rank * self.local_experts

    def count_on(self, device: torch.device) -> Tensor:
        """rows_dropped, made on the first call."""
        if self.rows_dropped is None or self.rows_dropped.device != device:
            self.rows_dropped = torch.zeros(1, dtype=torch.int32, device=device)
        return self.rows_dropped

    def check_tokens(self, operation: str, tokens: int, equal: bool = True) -> None:
        """Of one call. That all ranks have as many is looked at under SONICMOE_CHECK=1, where it
        costs an exchange between the hosts; NCCL and gloo would hang or end the process."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            refuse(operation, "x", f"at most {self.max_tokens} tokens", tokens)
        looks = os.environ.get("SONICMOE_CHECK") == "1" and not torch.compiler.is_compiling()
        if not equal or not looks:
            return
        counts: list[Any] = [None] * self.size
        dist.all_gather_object(counts, tokens, group=self.group)
        for rank, count in enumerate(counts):
            if count != counts[0]:
                expected = f"{counts[0]} tokens on rank {rank}, as on rank 0"
                refuse(operation, "x", expected, count)

    def _agree(self) -> None:
        own = {
            "version": __version__, "hidden_size": self.hidden_size,
            "num_experts": self.num_experts, "top_k": self.top_k, "dtype": str(self.dtype),
            "max_tokens": self.max_tokens, "transport": self.transport,
        }  # fmt: skip
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, own, group=self.group)
        for rank, theirs in enumerate(everyones):
            for field, value in theirs.items():
                if value != everyones[0][field]:
                    expected = f"{everyones[0][field]} on rank {rank}, as on rank 0"
                    refuse("Context", field, expected, value)
