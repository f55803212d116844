"""The optimizer's moments in a checkpoint, by torch.distributed.checkpoint: under the names of the
parameters, so they load into whatever parts of them a process holds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from . import files
from .group import Group
from .parallel import local
from .schema import UserError

FOLDER = "optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")


def of(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's, by name; none before the first step."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """A process's own error in place of torch's exception, which is of no class that is caught."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise files.system_error(first) from error


def _processes(group: Group) -> dict:
    return {"process_group": group.host, "no_dist": group.size == 1}


def save(folder: Path, moments: dict[str, Tensor], group: Group) -> None:
    """Collective; every process writes what it holds."""
    with _plain_errors():
        dcp.save(moments, checkpoint_id=folder, **_processes(group))


def load(
    folder: Path, step: int, parameters: dict[str, nn.Parameter], group: Group
) -> dict[str, Tensor]:
    """Those of `step` in the layout of the parameters, provided that they are whole and finite.
    Collective; UserError."""
    if step == 0:
        return {}
    moments = {
        f"{name}.{moment}": torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }
    try:
        _check(folder, moments)
        with _plain_errors():
            dcp.load(moments, checkpoint_id=folder, **_processes(group))
    except UserError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise UserError(f"{FOLDER}: {files.reason(error)}") from error
    for name, moment in moments.items():
        if not local(moment).isfinite().all():
            raise UserError(f"{FOLDER}: {name} holds what is not finite")
    return moments


def _check(folder: Path, moments: dict[str, Tensor]) -> None:
    """Names, shapes and types, before anything is read."""
    there = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in sorted(moments.keys() ^ there.keys()):
        raise UserError(f"{FOLDER}: {name} is {'missing' if name in moments else 'too much'}")
    for name, moment in moments.items():
        kind = there[name]
        is_tensor = isinstance(kind, TensorStorageMetadata)
        got = (kind.size, kind.properties.dtype) if is_tensor else ("no tensor", "")
        if got != (moment.shape, torch.float32):
            raise UserError(
                f"{FOLDER}: {name}: expected float32 of shape {list(moment.shape)}, "
                f"got {got[1]} of shape {got[0]}"
            )


def put(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    moments: dict[str, Tensor],
    step: int,
) -> None:
    """Into an optimizer whose settings stay as they are."""
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {"step": torch.tensor(float(step))}
        | {moment: moments[f"{name}.{moment}"] for moment in MOMENTS}
        for index, name in enumerate(order)
        if step
    }
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})
