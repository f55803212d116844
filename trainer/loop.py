"""A training run in its folder: start, resume, the loop, and what is said when it fails."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from . import checkpoint, files, footprint, metrics, restore
from .config import Request, TrainConfig, merge_for_resume, read_config
from .model import choose_device, model_config, new_model
from .schema import UserError
from .screen import Screen
from .signals import Signals
from .trainer import Trainer, load_text


class Run:
    """A trainer at work in its folder."""

    def __init__(self, trainer: Trainer, run_dir: Path, signals: Signals) -> None:
        self.trainer, self.run_dir, self.signals = trainer, run_dir, signals
        self.config = trainer.config
        self.log = metrics.MetricsLog(run_dir / "metrics.jsonl", trainer.step)
        self.board = None
        if self.config.report_to == "tensorboard":
            self.board = metrics.Board(run_dir / "tensorboard", trainer.step)

    def close(self) -> None:
        self.log.close()
        if self.board:
            self.board.close()

    def append(self, line: dict) -> None:
        self.log.append(**line)
        if self.board:
            self.board.append(line)

    def last_validation(self) -> dict | None:
        """The newest line with a validation loss."""
        return next((line for line in reversed(self.log.lines) if "val_loss" in line), None)

    def save(self) -> None:
        """ArithmeticError where the last step made weights that no checkpoint should hold."""
        if not all(p.isfinite().all() for p in self.trainer.model.parameters()):
            raise ArithmeticError("the weights are no longer finite")
        self.log.sync()
        checkpoint.save(
            self.run_dir, self.trainer.state(), self.trainer.model, self.trainer.text.tokenizer
        )
        self.plot()

    def plot(self) -> None:
        if self.log.lines:
            metrics.plot_loss(
                self.log.lines,
                self.trainer.text.unigram,
                self.config.name,
                self.run_dir / "loss.png",
            )

    def loop(self, screen: Screen) -> int:
        """Trains to the last step; returns the exit code."""
        trainer, config, speed = self.trainer, self.config, 0.0
        while trainer.step < config.steps:
            begin = time.monotonic()
            line = trainer.train_step()
            last = trainer.step == config.steps
            latest = config.tokens_per_step / (time.monotonic() - begin)
            speed = 0.9 * speed + 0.1 * latest if speed else latest
            line["tokens_per_second"] = round(latest, 1)
            shares = trainer.tap.shares()
            if last or trainer.step % config.eval_every == 0:
                line["val_loss"] = trainer.validate()
                line["expert_shares"] = [[round(s, 5) for s in layer] for layer in shares]
                screen.validated(trainer.step, line["val_loss"])
            self.append(line)
            screen.update(trainer.step, line["loss"], speed, shares)
            if self.signals.received or screen.lost:
                self.save()
                told = (
                    f"stopped and saved at step {trainer.step}; "
                    f"--resume --name {config.name} continues"
                )
                if screen.lost:
                    raise OSError(f"{screen.lost.strerror}; {told}")
                screen.say(told)
                return 128 + self.signals.received
            if last or trainer.step % config.save_every == 0:
                self.save()
        return 0

    def finish(self, screen: Screen) -> None:
        trainer, last = self.trainer, self.log.lines[-1:]
        # A run that was stopped between two validations and has no steps left has none of its last.
        final = last[0].get("val_loss") if last else None
        final = trainer.validate() if final is None else final
        if self.config.sample_tokens:
            files.write_text(self.run_dir / "sample.txt", trainer.sample() + "\n")
        unigram = trainer.text.unigram
        share = final / unigram
        summary = {
            "step": trainer.step,
            "val_loss": final,
            "unigram_cross_entropy": unigram,
            "share_of_unigram": share,
        }
        files.write_text(self.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        screen.say(
            f"validation loss {final:.3f} nats/token; unigram cross-entropy of the same "
            f"text {unigram:.3f}; the model is at {share:.1%} of it"
        )
        screen.say(
            f"in {self.run_dir}/: metrics.jsonl, loss.png, sample.txt, memory.json, checkpoint/"
        )


def train(request: Request, signals: Signals) -> int:
    """Starts or resumes the run that the request describes; returns the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config, run_dir = request.config, request.config.run_dir
    checkpoint.remove_killed_starts(run_dir.parent)
    if request.resume:
        saved, digest = read_config(run_dir)
        config = merge_for_resume(saved, request)
        with checkpoint.exclusive(run_dir):
            trainer = _resumed(config, digest)
            checkpoint.write_config(run_dir, config, digest)
            checkpoint.remove_incomplete(run_dir)
            return _trained(trainer, run_dir, signals)
    checkpoint.check_free(run_dir, request.overwrite)
    with checkpoint.new_run(run_dir) as folder:
        trainer = _started(config, request.digest)  # settles config.dtype, which is written below
        checkpoint.write_config(folder, config, trainer.text.digest)
        checkpoint.save(folder, trainer.state(), trainer.model, trainer.text.tokenizer)
        checkpoint.check_free(run_dir, request.overwrite)
        signals.deferred = True  # until the first step: no signal comes between two renames
        checkpoint.publish(folder, run_dir)
        return _trained(trainer, run_dir, signals)


def _started(config: TrainConfig, digest: str) -> Trainer:
    device = _prepare(config)
    text = load_text(config, None, digest)
    with _sizes_explained(config, device, len(text.tokenizer)):
        model = new_model(config, len(text.tokenizer), text.tokenizer.eos_token_id)
        return Trainer(config, device, model, text)


def _resumed(config: TrainConfig, digest: str) -> Trainer:
    """Reads all and changes nothing."""
    run_dir = config.run_dir
    restore.verify(run_dir)
    state = restore.load_state(run_dir)
    restore.check_settings(state, config, digest)
    metrics.read_metrics(run_dir / "metrics.jsonl", state.step)
    device = _prepare(config)
    text = load_text(config, run_dir, digest)
    vocab_size, end = len(text.tokenizer), text.tokenizer.eos_token_id
    with _sizes_explained(config, device, vocab_size):
        model = restore.load_model(run_dir, model_config(config, vocab_size, end))
        trainer = Trainer(config, device, model, text)
        trainer.restore(state)
    return trainer


def _prepare(config: TrainConfig) -> torch.device:
    """Settles device and type, and refuses at once what is not there, or cannot fit into the memory
    by formula."""
    if config.report_to == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("--report-to tensorboard: the package tensorboard is not installed")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if device.type == "cuda" else "float32"
    layout, capacity = footprint.layout_of(config), footprint.capacity_of(device.type)
    needed = footprint.peak(config, layout, config.vocab_size, config.batch_size)["peak"]
    if needed > 1.1 * capacity:  # the formula is within some percent
        raise UserError(_report_of_sizes(config, device, config.vocab_size))
    return device


# ----------------------------------------------------------------------------------------- failures


def _report_of_sizes(config: TrainConfig, device: torch.device, vocab_size: int) -> str:
    layout, capacity = footprint.layout_of(config), footprint.capacity_of(device.type)
    return footprint.out_of_memory_report(config, layout, vocab_size, config.batch_size, capacity)


@contextlib.contextmanager
def _sizes_explained(config: TrainConfig, device: torch.device, vocab_size: int):
    """Turns torch's error into one that names the sizes and a microbatch that fits."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not footprint.is_out_of_memory(error):
            raise
        report = _report_of_sizes(config, device, vocab_size)
        raise MemoryError(f"{report} ({files.reason(error)})") from error


@contextlib.contextmanager
def _failure_explained(trainer: Trainer, run_dir: Path):
    """Says in which step, and what is left. A RuntimeError may be the router's that met NaN."""
    try:
        with _sizes_explained(trainer.config, trainer.device, len(trainer.text.tokenizer)):
            yield
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        kept = checkpoint.last_good(run_dir)
        raise RuntimeError(f"{trainer.doing}: {what}; {kept}") from error


def _trained(trainer: Trainer, run_dir: Path, signals: Signals) -> int:
    config = trainer.config
    screen = Screen(config.steps, trainer.step, trainer.text.unigram)
    run = Run(trainer, run_dir, signals)
    if validation := run.last_validation():
        screen.validated(validation["step"], validation["val_loss"])
    code = 0
    with _failure_explained(trainer, run_dir), contextlib.closing(run):
        _introduce(trainer, screen, run_dir)
        if trainer.step < config.steps:
            report = json.dumps(trainer.memory(), indent=2) + "\n"
            files.write_text(run_dir / "memory.json", report)
            signals.deferred = True
            with screen:
                code = run.loop(screen)
            signals.deferred = False
        else:
            screen.say("all steps are done; a larger --steps goes further")
        if code == 0:
            run.finish(screen)
    if screen.lost and code == 0:
        raise screen.lost
    return code


def _introduce(trainer: Trainer, screen: Screen, run_dir: Path) -> None:
    config, model = trainer.config, trainer.model
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    active = total - experts + experts * config.top_k // config.num_experts
    router = config.router
    if router == "token-rounding":
        router += f" ({config.policy}, tile {config.tile})"
    screen.say(f"text       {trainer.text.description}")
    screen.say(
        f"model      Qwen3-MoE, {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active; "
        f"{config.layers} layers of {config.num_experts} experts, top-{config.top_k}"
    )
    screen.say(f"experts    {config.experts}, router {router}, {config.dtype} on {trainer.device}")
    screen.say(f"unigram    {trainer.text.unigram:.3f} nats/token is the cross-entropy to beat")
    place = f"run        {run_dir}/, step {trainer.step} of {config.steps}"
    screen.say(f"{place}; last validation loss {screen.validation}" if trainer.step else place)
