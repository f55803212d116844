"""How the work of one start is spread over processes. No part of a run's settings: a run may go on
under another."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from .config import TrainConfig
from .schema import Rule, UserError, number, rules_of, setting, switch, whole
from .signals import Quiet

SPREAD = "several processes"
MOST = 1 << 16


@dataclasses.dataclass
class Layout:
    gpus: int = setting(
        0, whole(0, MOST), "start so many processes on this machine, each with a GPU of its own; "
        "a batch is divided among them", SPREAD,
    )  # fmt: skip
    processes: int = setting(
        0, whole(0, MOST), "start so many processes on the CPU of this machine", SPREAD
    )
    fsdp: bool = setting(
        False, switch(), "shard weights, gradients and optimizer over all processes; each has a "
        "copy otherwise", SPREAD,
    )  # fmt: skip
    ep: int = setting(
        1, whole(1, MOST), "processes that share the experts of a layer; all else as with --fsdp",
        SPREAD,
    )  # fmt: skip
    row_capacity: float = setting(
        0.0, number(), "with --ep: room for so many times the mean rows of a process, what is "
        "beyond is dropped and counted; 0: room for all, for which every layer waits", SPREAD,
    )  # fmt: skip

    @property
    def asked(self) -> int:
        """Processes of the command line, 0 where it names none."""
        return self.gpus or self.processes

    @property
    def size(self) -> int:
        """Processes of this start: torchrun's, where it started this one."""
        return started_by_torchrun() or self.asked or 1

    def describe(self) -> str:
        if self.ep > 1:
            return f"experts over {self.ep} of them, all else sharded over all"
        return "each with a shard (FSDP2)" if self.fsdp else "each with a copy"

    @property
    def sharded(self) -> bool:
        return self.fsdp or self.ep > 1


RULES: dict[str, Rule] = rules_of(Layout)


def started_by_torchrun() -> int:
    """The processes that torchrun, or --gpus and --processes, started this one among; else 0."""
    environment = os.environ
    return int(environment["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= environment.keys() else 0


@contextlib.contextmanager
def alike_everywhere() -> Iterator[None]:
    """Around what fails alike in all processes of a machine before they talk: its first tells."""
    try:
        yield
    except (UserError, ImportError) as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            raise
        raise Quiet(2 if isinstance(error, UserError) else 1) from error


def validate(layout: Layout, config: TrainConfig) -> None:
    """Raises UserError for the first flag that cannot work with the others."""
    size, started = layout.size, started_by_torchrun()
    if layout.gpus and layout.processes:
        raise UserError(
            f"--gpus {layout.gpus} and --processes {layout.processes}: expected one of them"
        )
    if started and layout.asked and layout.asked != started:
        flag = "--gpus" if layout.gpus else "--processes"
        raise UserError(f"{flag} {layout.asked}: expected the {started} processes of torchrun")
    for flag, number_of, device in (
        ("--gpus", layout.gpus, "cpu"),
        ("--processes", layout.processes, "cuda"),
    ):
        if number_of and config.device == device:
            raise UserError(f"{flag} {number_of}: expected another device than --device {device}")
    if layout.fsdp and size == 1:
        raise UserError("--fsdp: expected several processes (--gpus, --processes, torchrun), got 1")
    _validate_experts(layout, config, size)
    if config.batch_size % size:
        raise UserError(
            f"--batch-size {config.batch_size}: expected a multiple of the {size} processes"
        )
    if config.router == "token-rounding" and config.tile > config.tokens_per_batch // size:
        raise UserError(
            f"--tile {config.tile} is larger than the {config.tokens_per_batch // size} tokens of "
            f"a batch that each of the {size} processes has"
        )


def _validate_experts(layout: Layout, config: TrainConfig, size: int) -> None:
    if size % layout.ep:
        raise UserError(f"--ep {layout.ep}: expected a divisor of the {size} processes")
    if config.num_experts % layout.ep:
        raise UserError(
            f"--ep {layout.ep}: expected a divisor of --num-experts {config.num_experts}"
        )
    if layout.ep > 1 and config.experts != "sonicmoe_cpp":
        raise UserError(f"--ep {layout.ep}: expected --experts sonicmoe_cpp, got {config.experts}")
    if layout.row_capacity and layout.ep == 1:
        raise UserError(f"--row-capacity {layout.row_capacity}: expected --ep above 1, got 1")
