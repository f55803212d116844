"""What the user sees while a model trains."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from . import program

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(shares: list[float]) -> str:
    """One block per expert; half height is an even share, full height twice that or more."""
    even = 1 / len(shares)
    return "".join(_BLOCKS[min(7, int(4 * share / even))] for share in shares)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # what write() raised, instead of ending the process


class Screen:
    """A live panel on a terminal, plain lines anywhere else.

    Where writing fails (the reader has left, the terminal is closed, the disk is full) `lost` holds
    the error and nothing more is written: the training loop saves and ends.
    """

    def __init__(self, steps: int, start: int, unigram: float) -> None:
        self.console = _Console(highlight=False, soft_wrap=True)
        self.lost: OSError | None = None
        self.steps, self.start, self.unigram = steps, start, unigram
        self.started = time.monotonic()
        self.validation = "–"
        self._lines_every = max(1, steps // 20)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, left="")
        self._live = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            self.lost = program.lost(error)
            self.console.quiet = True

    def __enter__(self):
        if self._live:
            with self._writing():
                self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._live:
            with self._writing():
                self._live.stop()

    def say(self, line: str) -> None:
        with self._writing():
            self.console.print(program.printable(line), markup=False)

    def validated(self, step: int, loss: float) -> None:
        self.validation = f"{loss:.3f} (step {step})"

    def update(self, step: int, loss: float, speed: float, shares: list[list[float]]) -> None:
        """Shows the state after a step; shares: per layer, the share of rows of each expert."""
        done = step - self.start
        left = (time.monotonic() - self.started) / done * (self.steps - step)
        if self._live:
            self._progress.update(self._task, completed=step, left=f"{clock(left)} left")
            with self._writing():
                self._live.update(self._panel(loss, speed, shares), refresh=True)
        elif step % self._lines_every == 0 or step in (self.start + 1, self.steps):
            flat = [share for layer in shares for share in layer]
            self.say(
                f"step {step}/{self.steps}  loss {loss:.3f}  validation {self.validation}  "
                f"{speed:,.0f} tokens/s  share per expert {min(flat):.1%} to "
                f"{max(flat):.1%}  {sparkline(shares[0])}  {clock(left)} left"
            )

    def _panel(self, loss: float, speed: float, shares: list[list[float]]) -> Group:
        lines = [
            Text(
                f"loss {loss:.3f}   validation {self.validation}   unigram "
                f"{self.unigram:.3f}   {speed:,.0f} tokens/s"
            ),
            Text("share of tokens per expert (half height = even)", style="dim"),
        ]
        for index, layer in enumerate(shares):
            lines.append(
                Text(
                    f"  layer {index}  {sparkline(layer)}  {min(layer):.1%} to {max(layer):.1%}",
                    no_wrap=True,
                )
            )
        return Group(self._progress, *lines)
