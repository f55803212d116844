"""What the ranks of an expert-parallel group agree on, and count."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._library import __version__
from .._rules import SIZE, Integer, Name, Optional, Positive, refuse
from . import nvlink
from .peers import everyone

TRANSPORTS = Name({"auto": 0, "gather": 1, "nvlink": 2})


class Context:
    """An exchange between ranks that each hold num_experts / size of the experts, in rank order.

    group is a process group or a mesh of one dimension; hidden_size d, num_experts E, top_k K
    (None: what a call brings) and dtype are those of the layers that share the context; max_tokens
    bounds the tokens of a call (None: any number). transport "gather" gathers the tokens of all
    ranks and sums their partial rows through torch.distributed (NCCL, gloo). "nvlink" reads what it
    needs from the memory of the other ranks: GPUs of one host that reach each other, bfloat16, or
    processes of one host on a CPU. It wants top_k and max_tokens, takes three times size *
    max_tokens rows of d on the device, and names in an error a rank that does not come within
    timeout_seconds (None: SONICMOE_EP_TIMEOUT, else 600). "auto" takes "gather" until "nvlink" has
    been measured between GPUs; SONICMOE_LOG=dispatch tells the choice. device is that of the
    layers; None: the mesh's, else the group's.

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
        timeout_seconds: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        operation = "Context"
        if isinstance(group, DeviceMesh):
            device = group.device_type if device is None else device
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
        timeout = Optional(Positive()).check(operation, "timeout_seconds", timeout_seconds)
        self._agree()
        if num_experts % self.size != 0:
            expected = f"a multiple of the {self.size} ranks of the group"
            refuse(operation, "num_experts", expected, num_experts)
        self.rows_dropped: Tensor | None = None
        self.exchange: nvlink.Exchange | None = None
        if self.transport == "nvlink":
            self._open(_device_of(group, device), timeout)
        else:
            asked = "asked for" if self.transport == "gather" else "nvlink is taken by name alone"
            nvlink.tell("gather", asked)

    def _open(self, device: torch.device, timeout: float | None) -> None:
        reason = nvlink.reason_against(self, device)
        if reason:
            refuse("Context", "transport", "another than nvlink", reason)
        self.exchange = nvlink.open_exchange(self, device, timeout)
        nvlink.tell("nvlink", "asked for")

    def close(self) -> None:
        """Gives back what "nvlink" holds on the device, once the last context of the same group and
        sizes is closed: they share it. Without it the memory stays. Collective; after it no call,
        and no backward of an earlier one."""
        if self.exchange is None:
            return
        if self.exchange.device.type == "cuda":
            torch.cuda.synchronize(self.exchange.device)
        dist.barrier(self.group)
        nvlink.close_exchange(self.exchange)
        self.exchange = None

    def check(self) -> None:
        """Raises what ended a call of this rank: who waited how long for whom, in which call. On a
        GPU results are NaN from there on, and the next call raises it too."""
        if self.exchange is not None:
            self.exchange.check()

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
        counts = everyone(self.group, tokens)
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
        everyones = everyone(self.group, own)
        for rank, theirs in enumerate(everyones):
            for field, value in theirs.items():
                if value != everyones[0][field]:
                    expected = f"{everyones[0][field]} on rank {rank}, as on rank 0"
                    refuse("Context", field, expected, value)


def _device_of(group: Any, device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
