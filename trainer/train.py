"""Entry point: python -m trainer.train [flags], or make train ARGS="[flags]"."""

from __future__ import annotations

import sys

from . import program
from .config import parse_train
from .signals import Signals


def work(argv: list[str], signals: Signals) -> int:
    request = parse_train(argv)
    from .loop import train  # torch takes seconds to load: only when it is needed

    return train(request, signals)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of program.run."""
    return program.run("train", work, argv)


if __name__ == "__main__":
    sys.exit(main())
