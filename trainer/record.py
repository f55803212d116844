"""What a run tells and leaves behind, by the first of its processes."""

from __future__ import annotations

import json
from pathlib import Path

from . import files, metrics
from .screen import Screen
from .trainer import Trainer


class Record:
    """Lines on the screen, metrics.jsonl, pictures, events for TensorBoard."""

    def __init__(self, trainer: Trainer, run_dir: Path) -> None:
        self.trainer, self.config, self.run_dir = trainer, trainer.config, run_dir
        self.screen = Screen(self.config.steps, trainer.step, trainer.text.unigram)
        self.log = metrics.MetricsLog(run_dir / "metrics.jsonl", trainer.step)
        self.board = None
        if self.config.report_to == "tensorboard":
            self.board = metrics.Board(run_dir / "tensorboard", trainer.step)
        validated = (line for line in reversed(self.log.lines) if "val_loss" in line)
        if line := next(validated, None):
            self.screen.validated(line["step"], line["val_loss"])

    @property
    def lost(self) -> OSError | None:
        """Why nobody sees the screen any more."""
        return self.screen.lost

    def close(self) -> None:
        self.log.close()
        if self.board:
            self.board.close()

    def say(self, line: str) -> None:
        self.screen.say(line)

    def introduce(self) -> None:
        trainer, config = self.trainer, self.config
        total = sum(p.numel() for p in trainer.model.parameters())
        layers = trainer.model.model.layers
        experts = sum(p.numel() for layer in layers for p in layer.mlp.parameters() if p.dim() == 3)
        active = total - experts + experts * config.top_k // config.num_experts
        router = config.router
        if router == "token-rounding":
            router += f" ({config.policy}, tile {config.tile})"
        self.say(f"text       {trainer.text.description}")
        self.say(
            f"model      Qwen3-MoE, {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active; "
            f"{config.layers} layers of {config.num_experts} experts, top-{config.top_k}"
        )
        self.say(
            f"experts    {config.experts}, router {router}, {config.dtype} on {trainer.device}"
        )
        if trainer.group.size > 1:
            self.say(f"processes  {trainer.group.size}, {trainer.layout.describe()}")
        self.say(f"unigram    {trainer.text.unigram:.3f} nats/token is the cross-entropy to beat")
        place = f"run        {self.run_dir}/, step {trainer.step} of {config.steps}"
        seen = self.screen.validation
        self.say(f"{place}; last validation loss {seen}" if trainer.step else place)

    def memory(self) -> None:
        """Of one process: shards of several tell little of a layer."""
        if self.trainer.group.size == 1:
            report = json.dumps(self.trainer.memory(), indent=2) + "\n"
            files.write_text(self.run_dir / "memory.json", report)

    def step(self, line: dict, speed: float, shares: list[list[float]]) -> None:
        if "val_loss" in line:
            self.screen.validated(line["step"], line["val_loss"])
        self.log.append(**line)
        if self.board:
            self.board.append(line)
        self.screen.update(line["step"], line["loss"], speed, shares)

    def sync(self) -> None:
        self.log.sync()

    def plot(self) -> None:
        if self.log.lines:
            unigram, picture = self.trainer.text.unigram, self.run_dir / "loss.png"
            metrics.plot_loss(self.log.lines, unigram, self.config.name, picture)

    def finish(self, final: float, sample: str) -> None:
        if sample:
            files.write_text(self.run_dir / "sample.txt", sample + "\n")
        unigram = self.trainer.text.unigram
        share = final / unigram
        summary = {
            "step": self.trainer.step,
            "val_loss": final,
            "unigram_cross_entropy": unigram,
            "share_of_unigram": share,
        }
        files.write_text(self.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.say(
            f"validation loss {final:.3f} nats/token; unigram cross-entropy of the same "
            f"text {unigram:.3f}; the model is at {share:.1%} of it"
        )
        names = ("metrics.jsonl", "loss.png", "sample.txt", "memory.json")
        left = [name for name in names if (self.run_dir / name).exists()]
        self.say(f"in {self.run_dir}/: {', '.join(left)}, checkpoint/")


class NoRecord:
    """Of the other processes: they do the same and tell nothing."""

    lost = None

    def _nothing(self, *unused) -> None:
        pass

    close = say = introduce = memory = step = sync = plot = finish = _nothing
