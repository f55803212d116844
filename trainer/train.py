"""Entry point: python -m trainer.train [flags], make train ARGS="[flags]", or under torchrun."""

from __future__ import annotations

import os
import sys

from . import program
from .layout import alike_everywhere, started_by_torchrun
from .request import parse_train
from .signals import Signals


def work(argv: list[str], signals: Signals) -> int:
    with alike_everywhere():
        request = parse_train(argv)
    if request.layout.asked > 1 and not started_by_torchrun():
        from .launch import launch

        return launch(argv, request)
    with alike_everywhere():
        from .start import train  # torch takes seconds to load: only when it is needed

    return train(request, signals)


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of program.run."""
    return program.run("train", work, argv)


if __name__ == "__main__":
    code = main()
    if code and started_by_torchrun() > 1:
        # At an orderly exit NCCL would wait for the processes that are gone.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
