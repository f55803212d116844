"""Whether a run fits into the memory of each of its processes, by formula, and what is said where
it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from . import files, footprint
from .config import TrainConfig
from .layout import Layout
from .schema import UserError


class Sizes:
    """Of one process: its share of a batch and, where they are sharded, of the states."""

    def __init__(self, config: TrainConfig, device: torch.device, layout: Layout) -> None:
        self.size, self.sharded = layout.size, layout.sharded
        batch_size = max(1, config.batch_size // self.size)
        self.config = dataclasses.replace(config, batch_size=batch_size)
        numbers = footprint.layout_of(config)
        if layout.sharded:  # what a layer gathers for its products, in their dtype, comes on top
            numbers = dataclasses.replace(
                numbers, cast=0, state=numbers.state / self.size,
                gradient=numbers.gradient / self.size,
            )  # fmt: skip
        elif self.size > 1:  # DDP's buckets, which hold the gradients, stay from step to step
            numbers = dataclasses.replace(
                numbers, state=numbers.state + numbers.gradient, gradient=0
            )
        self.numbers = numbers
        self.capacity = footprint.capacity_of(device.type)
        if device.type == "cpu":
            self.capacity //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def check(self, vocab_size: int) -> None:
        """UserError for what cannot fit; the formula is within some percent."""
        needed = footprint.peak(self.config, self.numbers, vocab_size, self.config.batch_size)
        if needed["peak"] > 1.1 * self.capacity:
            raise UserError(self.report(vocab_size))

    def report(self, vocab_size: int) -> str:
        report = footprint.out_of_memory_report(
            self.config, self.numbers, vocab_size, self.config.batch_size, self.capacity,
            whole_model=not self.sharded,
        )  # fmt: skip
        return report if self.size == 1 else f"in each of {self.size} processes: {report}"

    @contextlib.contextmanager
    def explained(self, vocab_size: int) -> Iterator[None]:
        """Turns torch's error into one that names the sizes and a microbatch that fits."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not footprint.is_out_of_memory(error):
                raise
            raise MemoryError(f"{self.report(vocab_size)} ({files.reason(error)})") from error
