"""The loop of a run: steps, validations, checkpoints, and what is said when one of them fails."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from . import checkpoint
from .group import is_lost_connection
from .parallel import local
from .record import NoRecord, Record
from .signals import Signals
from .sizes import Sizes
from .trainer import Trainer


class Run:
    """A trainer at work in its folder. With several processes each has one, and all do the same."""

    def __init__(self, trainer: Trainer, run_dir: Path, signals: Signals) -> None:
        self.trainer, self.run_dir, self.signals = trainer, run_dir, signals
        self.config, self.group = trainer.config, trainer.group
        self.record: Record | NoRecord = NoRecord()
        if self.group.is_first:
            self.record = Record(trainer, run_dir)
        self.final: float | None = None  # the validation loss of the last step

    def save(self) -> None:
        """ArithmeticError where the last step made weights that no checkpoint should hold."""
        weights = self.trainer.model.parameters()
        finite = all(local(p).isfinite().all() for p in weights)
        if self.group.most(0 if finite else 1):
            raise ArithmeticError("the weights are no longer finite")
        self.record.sync()
        checkpoint.save(self.run_dir, self.trainer.content(), self.group)
        self.record.plot()

    def step(self, speed: float) -> float:
        """One step, its validation and its line; returns the speed, averaged with that before."""
        trainer, config = self.trainer, self.config
        begin = time.monotonic()
        line = trainer.train_step()
        routing, shares = trainer.tap.end_step()
        latest = config.tokens_per_step / (time.monotonic() - begin)
        speed = 0.9 * speed + 0.1 * latest if speed else latest
        line |= routing | {"tokens_per_second": round(latest, 1)}
        if self.group.size > 1:
            line["tokens_per_second_per_process"] = round(latest / self.group.size, 1)
        self.final = None
        if trainer.step == config.steps or trainer.step % config.eval_every == 0:
            line["val_loss"] = self.final = trainer.validate()
            line["expert_shares"] = [[round(s, 5) for s in layer] for layer in shares]
        self.record.step(line, speed, shares)
        return speed

    def loop(self) -> int:
        """Trains to the last step; returns the exit code."""
        trainer, config, speed = self.trainer, self.config, 0.0
        while trainer.step < config.steps:
            speed = self.step(speed)
            lost = signal.SIGPIPE if self.record.lost else 0
            if wish := self.group.most(self.signals.wish() or lost):
                return self._stop(wish)
            if trainer.step == config.steps or trainer.step % config.save_every == 0:
                self.save()
        return 0

    def _stop(self, signal_number: int) -> int:
        self.save()
        told = (
            f"stopped and saved at step {self.trainer.step}; "
            f"--resume --name {self.config.name} continues"
        )
        if self.record.lost:
            raise OSError(f"{self.record.lost.strerror}; {told}")
        self.record.say(told)
        return 1 if signal_number == signal.SIGPIPE else 128 + signal_number

    def finish(self) -> None:
        # A run that was stopped between two validations and has no steps left has none of its last.
        trainer = self.trainer
        final = trainer.validate() if self.final is None else self.final
        sample = trainer.sample() if self.config.sample_tokens else ""
        self.record.finish(final, sample)


def run(trainer: Trainer, run_dir: Path, signals: Signals, sizes: Sizes) -> int:
    """Trains to the last step or a signal; returns the exit code."""
    with failure_explained(trainer, run_dir, sizes):
        work = Run(trainer, run_dir, signals)
        code = 0
        with contextlib.closing(work.record):
            work.record.introduce()
            if trainer.step < trainer.config.steps:
                work.record.memory()
                signals.deferred = True
                with getattr(work.record, "screen", contextlib.nullcontext()):
                    code = work.loop()
                signals.deferred = False
            else:
                work.record.say("all steps are done; a larger --steps goes further")
            if code == 0:
                work.finish()
    if work.record.lost and code == 0:
        raise work.record.lost
    return code


# ----------------------------------------------------------------------------------------- failures


@contextlib.contextmanager
def failure_explained(trainer: Trainer, run_dir: Path, sizes: Sizes) -> Iterator[None]:
    """Says in which step, and what is left. A RuntimeError may be the router's that met NaN."""
    try:
        with sizes.explained(len(trainer.text.tokenizer)):
            yield
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        if is_lost_connection(error):
            what = "another process has ended"
        kept = checkpoint.last_good(run_dir)
        raise RuntimeError(f"{trainer.doing}: {what}; {kept}") from error
