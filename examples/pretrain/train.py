"""Entry point: python -m pretrain.train [flags], or make train ARGS="[flags]"."""

from __future__ import annotations

import os
import sys

from .config import UserError, parse_train
from .signals import Signals, Stopped

# Threads that wait by spinning make every parallel region crawl once another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done; 2: a wrong request; 1: a failure; 130 and 143: stopped by a signal."""
    try:
        request = parse_train(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return report(error, 2)
    signals = Signals()
    signals.install()
    try:
        from .trainer import train  # torch takes seconds to load: only when it is needed

        return train(request, signals)
    except UserError as error:
        return report(error, 2)
    except (OSError, ArithmeticError, MemoryError) as error:
        return report(error, 1)
    except Stopped as stop:
        return stop.exit_code


def report(error: Exception, code: int, prog: str = "train") -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
