"""Starting a run, or going on with one: what is checked and read before the first step."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from transformers.utils import logging as transformers_logging

from . import checkpoint, loop, metrics, restore
from .config import TrainConfig
from .group import Group, failures_told_once, join
from .layout import alike_everywhere
from .model import choose_device, model_config, new_model
from .request import Request, settled
from .schema import UserError
from .signals import Signals
from .sizes import Sizes
from .trainer import Text, Trainer, load_text


def train(request: Request, signals: Signals) -> int:
    """Starts or resumes the run that the request describes; returns the exit code. Every process of
    the run calls it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with alike_everywhere():
        if os.environ.get("RANK", "0") == "0":
            checkpoint.remove_killed_starts(request.config.run_dir.parent)
        config, digest = settled(request)
        if not request.resume and request.layout.size == 1:
            checkpoint.check_free(config.run_dir, request.overwrite)
        device = _device(config, request.layout.size)
    group = join(device, request.layout.size)
    with failures_told_once(group):
        config.name = group.share(lambda: config.name)  # it may be the time of this process
        if not request.resume:
            group.share(lambda: checkpoint.check_free(config.run_dir, request.overwrite))
        begin = _resume if request.resume else _begin
        code = begin(Start(request, config, digest, group), signals)
        group.leave()
        return code


def _device(config: TrainConfig, size: int) -> torch.device:
    """Settles --device and --dtype, and refuses at once what is not there."""
    if config.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--report-to tensorboard: the package tensorboard is not installed")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if size == 1 or device.type == "cpu":
        return device
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        if name not in os.environ:
            raise UserError(f"{name}: expected in the environment, as torchrun sets it beside RANK")
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > gpus:
        raise UserError(f"{here} processes on this machine: expected at most its {gpus} GPUs")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


class Start:
    """What the ways to a trainer have in common."""

    def __init__(self, request: Request, config: TrainConfig, digest: str, group: Group) -> None:
        self.request, self.config, self.digest, self.group = request, config, digest, group
        self.run_dir = config.run_dir
        self.sizes = Sizes(config, group.device, request.layout)
        self.sizes.check(config.vocab_size)

    def new(self) -> Trainer:
        text = load_text(self.config, None, self.digest, self.group)
        vocab_size, end = len(text.tokenizer), text.tokenizer.eos_token_id
        with self.sizes.explained(vocab_size):
            return self._trainer(new_model(self.config, vocab_size, end), text)

    def resumed(self) -> Trainer:
        """Reads all and changes nothing."""
        step = self.group.share(self._checked)
        text = load_text(self.config, self.run_dir, self.digest, self.group)
        shape = model_config(self.config, len(text.tokenizer), text.tokenizer.eos_token_id)
        with self.sizes.explained(len(text.tokenizer)):
            trainer = self._trainer(restore.load_model(self.run_dir, shape), text)
            trainer.restore(self.run_dir, step)
        return trainer

    def _checked(self) -> int:
        """The step of the checkpoint."""
        restore.verify(self.run_dir)
        step = restore.load_progress(self.run_dir, self.config, self.digest)
        metrics.read_metrics(self.run_dir / "metrics.jsonl", step)
        return step

    def _trainer(self, model: torch.nn.Module, text: Text) -> Trainer:
        layout, group = self.request.layout, self.group
        return Trainer(self.config, group.device, model, text, layout=layout, group=group)


def _begin(start: Start, signals: Signals) -> int:
    """A new run, in a hidden folder until its first checkpoint is complete."""
    config, run_dir, group = start.config, start.run_dir, start.group
    overwrite = start.request.overwrite
    with contextlib.ExitStack() as stack:
        folder = group.share(lambda: stack.enter_context(checkpoint.new_run(run_dir)))
        trainer = start.new()
        digest = trainer.text.digest
        group.share(lambda: checkpoint.write_config(folder, config, digest))
        checkpoint.save(folder, trainer.content(), group)
        signals.deferred = True  # until the first step: no signal comes between two renames

        def publish() -> None:
            checkpoint.check_free(run_dir, overwrite)
            checkpoint.publish(folder, run_dir)

        group.share(publish)
        return loop.run(trainer, run_dir, signals, start.sizes)


def _resume(start: Start, signals: Signals) -> int:
    config, run_dir, group = start.config, start.run_dir, start.group
    with contextlib.ExitStack() as stack:
        group.share(lambda: stack.enter_context(checkpoint.exclusive(run_dir)))
        trainer = start.resumed()

        def cleaned() -> None:
            checkpoint.write_config(run_dir, config, start.digest)
            checkpoint.remove_incomplete(run_dir)

        group.share(cleaned)
        return loop.run(trainer, run_dir, signals, start.sizes)
