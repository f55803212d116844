"""Memory of every rank of a group, each at an address of this process.

map_files      on a CPU: files in memory, which the processes of one host map
map_symmetric  on GPUs of one host: torch's symmetric memory
map_ipc        there too: CUDA IPC handles, where symmetric memory is not to be had

All are collective. An error of one rank is raised on every rank.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """`addresses` by rank, and what keeps them valid."""

    addresses: list[int]
    kept: Any


def everyone(group: Any, own: Any) -> list[Any]:
    """What every rank has, by rank."""
    theirs: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, own, group=group)
    return theirs


def tried(group: Any, action: Callable[[], Any]) -> tuple[Any, str]:
    """The result, and "" or the first error of all ranks."""
    result, error = None, ""
    try:
        result = action()
    except Exception as failure:
        error = f"rank {dist.get_rank(group)}: {type(failure).__name__}: {failure}"
    return result, next((e for e in everyone(group, error) if e), "")


def agreed(group: Any, action: Callable[[], Any]) -> Any:
    """The result, once every rank has one."""
    result, error = tried(group, action)
    if error:
        raise RuntimeError(f"Context: memory of {error}")
    return result


def map_files(group: Any, size: int) -> Peers:
    def make() -> str:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        file, name = tempfile.mkstemp(prefix="sonicmoe-", dir=folder)
        made.append(name)
        with os.fdopen(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)  # else a signal at the first use
        return name

    def map_all() -> list[mmap.mmap]:
        maps = []
        for name in names:
            with open(name, "r+b") as theirs:
                maps.append(mmap.mmap(theirs.fileno(), size))
        return maps

    made: list[str] = []
    try:
        names = everyone(group, agreed(group, make))
        maps = agreed(group, map_all)  # after which no name is needed
    finally:
        for name in made:
            os.unlink(name)
    return Peers([ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in maps], maps)


def map_symmetric(group: Any, size: int, device: torch.device) -> Peers:
    # Multicast is of no use here, and not everywhere to be had.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric

    buffer = agreed(group, lambda: symmetric.empty(size, dtype=torch.uint8, device=device))
    handle = agreed(group, lambda: symmetric.rendezvous(buffer, group))
    return Peers([int(address) for address in handle.buffer_ptrs], (buffer, handle))


def map_ipc(group: Any, size: int, device: torch.device) -> Peers:
    rank = dist.get_rank(group)

    def make() -> tuple[Tensor, tuple]:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        return buffer, buffer.untyped_storage()._share_cuda_()[1:]

    def open_all() -> list[Any]:
        new = torch.UntypedStorage._new_shared_cuda
        # Opened on the own device, so that its kernels reach the other's memory.
        return [
            buffer.untyped_storage() if r == rank else new(device.index, *theirs)
            for r, theirs in enumerate(handles)
        ]

    buffer, handle = agreed(group, make)
    handles = everyone(group, handle)
    storages = agreed(group, open_all)
    return Peers([storage.data_ptr() for storage in storages], (buffer, storages))
