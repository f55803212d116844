"""What the programs of this folder share: exit codes, one line for every failure, lost output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from .files import reason
from .schema import UserError
from .signals import Quiet, Signals

# Threads that wait by spinning make every parallel region crawl once another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def printable(text: str) -> str:
    """One line for a terminal: names of files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def report(error: BaseException, code: int, prog: str) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = printable(" ".join((text or type(error).__name__).split()))
    if (rank := os.environ.get("RANK", "0")) != "0":
        line = f"process {rank}: {line}"
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(f"{prog}: error: {line}", file=sys.stderr, flush=True)
    return code


def drop_output() -> None:
    """Sends what stdout still holds, and all that follows, nowhere: its reader has left or its disk
    is full, and Python would try again at its exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def lost(error: OSError) -> OSError:
    """For an error of writing to stdout, from where nothing more can be written: one that says
    so."""
    drop_output()
    return OSError(error.errno, f"cannot write the output: {reason(error)}")


def say(text: str = "", end: str = "\n") -> None:
    """print() whose failure is noticed at once and told as what it is."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise lost(error) from error


def run(prog: str, work: Callable[[list[str], Signals], int], argv: list[str] | None) -> int:
    """The exit code of `work`: 0 done; 2 a wrong request; 1 a failure; 128 + N stopped by signal N.

    A failure is one line. Of errors that torch or the system raises `python -X dev` shows the
    traceback.
    """
    signals = Signals()
    signals.install()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = work(sys.argv[1:] if argv is None else argv, signals)
        except SystemExit as stop:  # --help
            code = stop.code or 0
        say(end="")  # what may still be in the buffer
        return code
    except UserError as error:
        return report(error, 2, prog)
    except Quiet as quiet:
        return quiet.exit_code
    except (OSError, ArithmeticError, MemoryError, RuntimeError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        return report(error, 1, prog)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers, without threads for one
            raise
        return report(error, 1, prog)
