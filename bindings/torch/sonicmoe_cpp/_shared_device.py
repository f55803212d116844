"""Whether other kernels, such as NCCL's, run on the GPU beside this library's."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._library import ops
from ._rules import FLAG

_setting: bool | None = None
_told = False


def set_shared_device(shared: bool | None) -> None:
    """Whether the GPU is shared with other kernels; None (the default): it is wherever a process
    group of more than one rank exists.

    On a shared GPU every tile of a product goes to whichever multiprocessor is free. Beside a
    collective products then take 1.0 to 1.2 times as long as alone in place of 1.4 to 1.9; alone
    this costs up to 7% (docs/lab/M19.md). No bit of any result depends on it. It holds for all
    threads of the process. Errors: ValueError for anything but True, False and None.
    """
    global _setting
    _setting = None if shared is None else FLAG.check("set_shared_device", "shared", shared)


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def tell_library(tensor: torch.Tensor) -> None:
    """Before a call on `tensor`. In a traced call nothing runs, and telling would be traced."""
    global _told
    if not tensor.is_cuda:
        return
    shared = several_ranks() if _setting is None else _setting
    if shared != _told and not is_in_torch_dispatch_mode():
        ops.set_shared_device(shared)
        _told = shared
