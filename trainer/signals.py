"""Ctrl-C, SIGTERM and a closed terminal: end at once where nothing is lost, else after saving."""

from __future__ import annotations

import signal


class Stopped(BaseException):
    """A signal ended the program where nothing needs to be saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into Stopped, or inside the training loop into a noted wish.

    A second signal inside the loop ends the process at once; the last checkpoint stays good. But a
    terminal that closes may send SIGHUP twice, itself and through its shell.
    """

    def __init__(self) -> None:
        self.deferred, self.received = False, 0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame) -> None:
        if not self.deferred:
            raise Stopped(number)
        if self.received and number == signal.SIGHUP:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
