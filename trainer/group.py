"""The processes that train one model together, and what they tell each other."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import signals
from .schema import UserError
from .signals import Quiet

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=1)  # with the first, which may hash a large checkpoint
LAUNCHED = "sonicmoe-train"  # elastic's run id, where trainer.launch has started the processes


class Group:
    """All processes of a run; one alone talks to nobody. Everything but `rank`, `size` and
    `first_to_tell` is collective."""

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        host: dist.ProcessGroup | None = None,
        store: dist.Store | None = None,
    ) -> None:
        """host: the same processes, for tensors and objects of the host."""
        self.device, self.rank, self.size = device, rank, size
        self.host, self._store = host, store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes, the same bits on each."""
        return values if self.size == 1 else self.gather(values).mean(0)

    def gather(self, values: Tensor) -> Tensor:
        """[...] of every process as [size, ...]."""
        if self.size == 1:
            return values[None]
        everyones = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(everyones, values.contiguous())
        return torch.stack(everyones)

    def most(self, number: int) -> int:
        """The largest of a number of each process."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host)
        return int(largest)

    def share(self, work: Callable[[], T]) -> T:
        """What the first process gets from `work`, on all; where it fails, it raises and the others
        end quietly."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, False]
        try:
            if self.is_first:
                told = [work(), True]
        except Exception:
            signals.ignore_launcher()  # which would end this one before its line
            raise
        finally:
            dist.broadcast_object_list(told, 0, group=self.host)
        if not told[1]:
            raise Quiet(1)
        return told[0]

    def first_to_tell(self) -> bool:
        """Whether no other process has told the user why all of them end."""
        if self._store is None:
            return True
        try:
            return self._store.add("told", 1) == 1
        except RuntimeError:  # whoever held the store is gone
            return self.is_first

    def leave(self) -> None:
        if self._store is not None:
            dist.destroy_process_group()


def join(device: torch.device, size: int) -> Group:
    """The group of this process, which computes on `device`: with NCCL on GPUs, else gloo."""
    if size == 1:
        return Group(device)
    # Whole experts for a checkpoint take two collectives, of which it warns.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    store, rank, size = next(dist.rendezvous("env://"))
    place = {"store": store, "rank": rank, "world_size": size}
    if device.type == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE, **place)
        return Group(device, rank, size, dist.group.WORLD, store)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **place)
    host = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Group(device, rank, size, host, store)


@contextlib.contextmanager
def failures_told_once(group: Group) -> Iterator[None]:
    """Of the processes that fail, one tells why. That a connection has ended is no reason where
    trainer.launch looks on, which knows the process that died."""
    try:
        yield
    except (UserError, OSError, ArithmeticError, MemoryError, RuntimeError, ImportError) as error:
        if group.size == 1:
            raise
        code = 2 if isinstance(error, UserError) else 1
        if is_lost_connection(error) and os.environ.get("TORCHELASTIC_RUN_ID") == LAUNCHED:
            raise Quiet(code) from error
        if not group.first_to_tell():
            raise Quiet(code) from error
        raise


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process has ended, as NCCL and gloo say it. One that is too slow, or NCCL
    that cannot begin, is a reason to tell."""
    while error is not None:
        told = str(error)
        ended = "/gloo/" in told and "Timed out" not in told
        if ended or "remote process exit" in told or isinstance(error, dist.DistNetworkError):
            return True
        error = error.__cause__
    return False
