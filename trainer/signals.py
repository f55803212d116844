"""Ctrl-C, SIGTERM and a closed terminal: end at once where nothing is lost, else after saving."""

from __future__ import annotations

import os
import signal


def launched() -> bool:
    """Whether torch's launcher, or torchrun, has started this process and may end it."""
    return "RANK" in os.environ


def ignore_launcher() -> None:
    """Lets a process that it ends with the others say why all of them end."""
    if launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Quiet(BaseException):
    """Ends the program with that exit code; what there is to say has been said."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Stopped(Quiet):
    """A signal ended the program where nothing needs to be saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into Stopped, or inside the training loop into a noted wish.

    A second signal inside the loop ends the process at once; the last checkpoint stays good. But a
    terminal that closes may send SIGHUP twice, itself and through its shell, and a launcher passes
    SIGTERM on to processes that have it already, or that are the last to save.
    """

    def __init__(self) -> None:
        self.deferred, self.received = False, 0
        self._parent = os.getppid()

    def wish(self) -> int:
        """The signal that asks for an end; 0 where nothing does. A launcher that was killed is one:
        nobody would ever end its processes."""
        orphaned = launched() and os.getppid() != self._parent
        return self.received or (orphaned and signal.SIGTERM)

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame) -> None:
        if not self.deferred:
            raise Stopped(number)
        if self.received and (number == signal.SIGHUP or (number == signal.SIGTERM and launched())):
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
