"""Command line and settings of one training run."""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from pathlib import Path

ROUTERS = ("topk", "token-rounding")
POLICIES = ("nearest", "up", "down", "stochastic", "balanced", "nearest_score")
EXPERTS = ("sonicmoe_cpp", "eager", "grouped_mm")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")

# A resumed run continues the curve of its first start, so everything that shapes the curve is
# taken from the saved configuration; only these may be given anew.
CHANGEABLE_ON_RESUME = ("steps", "device", "threads", "eval_every", "save_every", "sample_tokens")


class UserError(Exception):
    """A mistake in what the user asked for: reported as one line, exit code 2."""


@dataclasses.dataclass
class TrainConfig:
    """Everything that determines a run; saved as runs/NAME/config.json."""

    name: str = ""
    runs_dir: str = "runs"
    data: str = ""  # empty: the sources of Python's standard library

    router: str = "topk"
    policy: str = "nearest"
    tile: int = 32
    experts: str = "sonicmoe_cpp"

    steps: int = 700
    batch_size: int = 4  # sequences in a batch
    seq_len: int = 256
    lr: float = 2e-3
    min_lr_ratio: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    aux_coef: float = 0.01
    seed: int = 0

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 128  # width of one expert
    layers: int = 4
    heads: int = 4
    num_experts: int = 32
    top_k: int = 4

    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0  # 0: what torch chooses
    eval_every: int = 100
    eval_tokens: int = 16384
    save_every: int = 100
    sample_tokens: int = 200
    sample_prompt: str = "def "

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Raises instead of printing the usage: a wrong flag is answered with one line."""
        raise UserError(f"{message} (--help lists the flags)")


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of TrainConfig. A flag not given is absent from the namespace."""
    defaults = TrainConfig()

    def add(group, flag: str, help_text: str, **kwargs) -> None:
        default = getattr(defaults, flag.lstrip("-").replace("-", "_"))
        if "choices" not in kwargs:
            kwargs.setdefault("type", type(default))
            kwargs.setdefault("metavar", "N" if isinstance(default, int) else "X")
        shown = "" if default == "" else f" (default: {default})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=help_text + shown, **kwargs)

    run = parser.add_argument_group("run")
    add(run, "--name", "the run's folder in the runs folder (default: pretrain-DATE-TIME)")
    add(run, "--runs-dir", "folder of the runs", metavar="DIR")
    add(
        run,
        "--data",
        "text to train on: a file, a folder, or a .bin of pretrain.prepare, whose vocabulary it then "
        "is (default: the sources of Python's standard library)",
        metavar="PATH",
    )
    add(run, "--seed", "seed of the weights, the order of the data and token rounding")
    add(
        run,
        "--device",
        "auto takes the GPU where there is one the experts can run on",
        choices=DEVICES,
    )
    add(
        run,
        "--dtype",
        "bfloat16 computes in bfloat16 and keeps float32 weights; auto is that on a GPU, else float32",
        choices=DTYPES,
    )
    add(run, "--threads", "CPU threads; 0 leaves the choice to torch")

    experts = parser.add_argument_group("experts and router")
    add(
        experts,
        "--experts",
        "who computes the experts: this library, or transformers' own loop "
        "(eager) or grouped matmul",
        choices=EXPERTS,
    )
    add(
        experts,
        "--router",
        "token-rounding moves each expert's rows to a multiple of --tile",
        choices=ROUTERS,
    )
    add(experts, "--policy", "how token rounding chooses between up and down", choices=POLICIES)
    add(experts, "--tile", "rows in a tile of token rounding")
    add(experts, "--aux-coef", "factor of the load balancing loss")

    optim = parser.add_argument_group("training")
    add(optim, "--steps", "training steps")
    add(optim, "--batch-size", "sequences in a batch")
    add(optim, "--seq-len", "tokens in a sequence")
    add(optim, "--lr", "peak learning rate")
    add(optim, "--min-lr-ratio", "last learning rate as a fraction of the peak")
    add(optim, "--warmup", "steps of linear warmup before the cosine")
    add(optim, "--weight-decay", "AdamW's decay of the matrices")
    add(optim, "--grad-clip", "largest gradient norm")
    add(optim, "--eval-every", "steps between two validations")
    add(optim, "--eval-tokens", "validation tokens looked at each time")
    add(optim, "--save-every", "steps between two checkpoints")
    add(optim, "--sample-tokens", "length of the sampled text")
    add(optim, "--sample-prompt", "beginning of the sampled text", metavar="TEXT")

    model = parser.add_argument_group("model")
    add(model, "--vocab-size", "tokens of the byte-level BPE vocabulary (at least 257)")
    add(model, "--hidden-size", "width of the model")
    add(model, "--intermediate-size", "width of one expert")
    add(model, "--layers", "decoder layers")
    add(model, "--heads", "attention heads")
    add(model, "--num-experts", "experts in a layer")
    add(model, "--top-k", "experts per token")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    _add_train_flags(parser)
    return parser


@dataclasses.dataclass
class Request:
    """What the command line asked for: a configuration, and how to treat an existing run."""

    config: TrainConfig
    given: set[str]  # names of the fields that were on the command line
    resume: bool = False
    overwrite: bool = False


def parse_train(argv: list[str]) -> Request:
    parser = make_parser("train", "Train a small Mixture-of-Experts language model on real text.")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run --name, or the latest run without --name",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the run --name if it exists"
    )
    values = vars(parser.parse_args(argv))
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
    config = TrainConfig(**values)
    if resume and not config.name:
        config.name = latest_run(config.runs_dir)
    if not config.name:
        config.name = time.strftime("pretrain-%Y%m%d-%H%M%S")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", config.name):
        raise UserError(f"--name {config.name!r} must be letters, digits, '.', '_' or '-'")
    if not resume:
        validate(config)
    return Request(config, set(values), resume, overwrite)


def latest_run(runs_dir: str) -> str:
    runs = [path.parent for path in Path(runs_dir).glob("*/checkpoint")]
    if not runs:
        raise UserError(f"--resume: there is no run in {runs_dir}/")
    return max(runs, key=lambda run: (run / "checkpoint").lstat().st_mtime_ns).name


def validate(config: TrainConfig) -> None:
    """Raises UserError for the first setting that cannot work."""
    positive = (
        "tile",
        "steps",
        "batch_size",
        "seq_len",
        "lr",
        "grad_clip",
        "hidden_size",
        "intermediate_size",
        "layers",
        "heads",
        "num_experts",
        "top_k",
        "eval_every",
        "eval_tokens",
        "save_every",
    )
    not_negative = (
        "warmup",
        "weight_decay",
        "aux_coef",
        "seed",
        "threads",
        "sample_tokens",
        "min_lr_ratio",
    )
    for field in positive:
        if not getattr(config, field) > 0:
            raise UserError(f"{_flag(field)} must be positive, not {getattr(config, field)}")
    for field in not_negative:
        if not getattr(config, field) >= 0:
            raise UserError(f"{_flag(field)} must not be negative, not {getattr(config, field)}")
    if config.vocab_size < 257:
        raise UserError(
            f"--vocab-size must be at least 257 (256 bytes and the end of a text), "
            f"not {config.vocab_size}"
        )
    if config.top_k > config.num_experts:
        raise UserError(f"--top-k {config.top_k} is more than --num-experts {config.num_experts}")
    if config.hidden_size % (2 * config.heads):
        raise UserError(
            f"--hidden-size {config.hidden_size} must be a multiple of twice --heads "
            f"({config.heads})"
        )
    if config.router == "token-rounding":
        if config.experts != "sonicmoe_cpp":
            raise UserError(
                f"--router token-rounding needs --experts sonicmoe_cpp, not {config.experts}"
            )
        if config.tile > config.tokens_per_batch:
            raise UserError(
                f"--tile {config.tile} is larger than the {config.tokens_per_batch} "
                f"tokens of a batch"
            )


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def merge_for_resume(saved: TrainConfig, request: Request) -> TrainConfig:
    """The saved configuration with the changes that a resumed run allows."""
    merged = dataclasses.replace(saved, name=request.config.name, runs_dir=request.config.runs_dir)
    for field in sorted(request.given - {"name", "runs_dir"}):
        value, before = getattr(request.config, field), getattr(saved, field)
        if field in CHANGEABLE_ON_RESUME:
            setattr(merged, field, value)
        elif field == "dtype" and value == "auto":
            continue  # settled when the run began
        elif value != before:
            raise UserError(
                f"--resume: {_flag(field)} is {value} but the checkpoint of run "
                f"{merged.name} was made with {before}"
            )
    validate(merged)
    return merged
