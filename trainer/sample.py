"""Entry point: python -m trainer.sample --prompt TEXT: what a trained model writes after it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import program
from .config import DEVICES, NAME, latest_run, read_config, validate
from .schema import Parser, UserError, number, one_of, text, whole
from .signals import Signals


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("sample", "Text written by a trained model.")
    prompt = "beginning of the text; empty: a new one"
    parser.add("--prompt", text(), prompt, default="", metavar="TEXT")
    parser.add("--name", NAME, "the run (default: the latest)")
    parser.add("--runs-dir", text(), "folder of the runs", default="runs", metavar="DIR")
    parser.add("--tokens", whole(1, 65536), "tokens written", default=200, metavar="N")
    warmth = "below 1 the likelier tokens become likelier"
    parser.add("--temperature", number(above=True), warmth, default=0.8, metavar="X")
    parser.add("--seed", whole(0, 2**32 - 1), "another seed writes another text", default=0)
    parser.add("--device", one_of(*DEVICES), "auto takes a GPU where one can be used",
               default="auto", metavar="{" + ",".join(DEVICES) + "}")  # fmt: skip
    return parser.parse_args(argv)


def sample(arguments: argparse.Namespace) -> str:
    """UserError where there is no such run, or its checkpoint is damaged."""
    run_dir = Path(arguments.runs_dir) / (arguments.name or latest_run(arguments.runs_dir))
    config, _ = read_config(run_dir)
    config.device = arguments.device
    validate(config)

    from transformers.utils import logging as transformers_logging

    from . import model, restore, routing  # torch takes seconds to load: only when it is needed

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    restore.verify(run_dir)
    device = model.choose_device(config)
    tokenizer = restore.load_tokenizer(run_dir)
    shape = model.model_config(config, len(tokenizer), tokenizer.eos_token_id)
    trained = restore.load_model(run_dir, shape).to(device).eval()
    routing.RoutingTap(trained, config)  # the experts of the run
    with model.autocast(config, device):
        return model.sample_text(
            trained,
            tokenizer,
            arguments.prompt,
            arguments.tokens,
            arguments.seed,
            arguments.temperature,
        )


def work(argv: list[str], signals: Signals) -> int:
    arguments = parse(argv)
    try:
        program.say(sample(arguments))
    except UserError as error:  # of a run, it is told as the trainer tells it that resumes one
        raise UserError(str(error).replace("--resume: ", "--name: ", 1)) from error
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of program.run."""
    return program.run("sample", work, argv)


if __name__ == "__main__":
    sys.exit(main())
