"""Settings of one training run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from .schema import (
    Rule,
    UserError,
    check_fields,
    flag_of,
    number,
    one_of,
    path,
    read_json,
    rules_of,
    setting,
    text,
    whole,
)

ROUTERS = ("topk", "token-rounding")
POLICIES = ("nearest", "up", "down", "stochastic", "balanced", "nearest_score")
EXPERTS = ("sonicmoe_cpp", "eager", "grouped_mm")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("none", "tensorboard")

MOST_VOCABULARY = 1 << 20
NAME = text(
    "a name of letters, digits, '.', '_' and '-'", 128, pattern="[A-Za-z0-9_][A-Za-z0-9._-]*"
)
DIGEST = text("a SHA-256", 64, pattern="[0-9a-f]{64}")

# A resumed run continues the curve of its first start, so everything that shapes the curve is
# taken from the saved configuration; only these may be given anew.
CHANGEABLE_ON_RESUME = (
    "steps", "device", "threads", "report_to", "eval_every", "save_every", "sample_tokens"
)  # fmt: skip

RUN, ROUTING, TRAINING, MODEL = "run", "experts and router", "training", "model"


def choice(default: str, values: tuple[str, ...], help_text: str, group: str):
    return setting(default, one_of(*values), help_text, group, "{" + ",".join(values) + "}")


@dataclasses.dataclass
class TrainConfig:
    """Everything that determines a run; saved as runs/NAME/config.json."""

    name: str = setting(
        "", NAME, "the run's folder in the runs folder (default: train-DATE-TIME)", RUN
    )
    runs_dir: str = setting(
        "runs", text("a path in UTF-8", pattern="(?s:.+)"), "folder of the runs", RUN, "DIR"
    )
    data: str = setting(
        "", path(), "text to train on: a file, a folder, or a .bin of trainer.prepare, whose "
        "vocabulary it then is (default: the sources of Python's standard library)", RUN, "PATH",
    )  # fmt: skip
    seed: int = setting(
        0, whole(0, 2**32 - 1), "seed of the weights, the order of the data and token rounding", RUN
    )
    device: str = choice(
        "auto", DEVICES, "auto takes the GPU where there is one the experts can run on", RUN
    )
    dtype: str = choice(
        "auto", DTYPES, "bfloat16 computes in bfloat16 and keeps float32 weights; auto is that on "
        "a GPU, else float32", RUN,
    )  # fmt: skip
    threads: int = setting(0, whole(0, 1024), "CPU threads; 0 leaves the choice to torch", RUN)
    report_to: str = choice(
        "none", TRACKERS, "also writes the metrics for TensorBoard, to runs/NAME/tensorboard", RUN
    )

    experts: str = choice(
        "sonicmoe_cpp", EXPERTS, "who computes the experts: this library, or transformers' own "
        "loop (eager) or grouped matmul", ROUTING,
    )  # fmt: skip
    router: str = choice(
        "topk", ROUTERS, "token-rounding moves each expert's rows to a multiple of --tile", ROUTING
    )
    policy: str = choice(
        "nearest", POLICIES, "how token rounding chooses between up and down", ROUTING
    )
    tile: int = setting(32, whole(1), "rows in a tile of token rounding", ROUTING)
    aux_coef: float = setting(0.01, number(), "factor of the load balancing loss", ROUTING)

    steps: int = setting(700, whole(1), "training steps", TRAINING)
    batch_size: int = setting(
        4, whole(1), "sequences in a batch: one pass through the model", TRAINING
    )
    accumulate: int = setting(
        1, whole(1, 1 << 20), "batches in a step: their gradients are averaged", TRAINING
    )
    seq_len: int = setting(256, whole(1), "tokens in a sequence", TRAINING)
    lr: float = setting(2e-3, number(above=True), "peak learning rate", TRAINING)
    min_lr_ratio: float = setting(
        0.05, number(0, 1), "last learning rate as a fraction of the peak", TRAINING
    )
    warmup: int = setting(100, whole(), "steps of linear warmup before the cosine", TRAINING)
    weight_decay: float = setting(0.1, number(), "AdamW's decay of the matrices", TRAINING)
    grad_clip: float = setting(1.0, number(above=True), "largest gradient norm", TRAINING)
    eval_every: int = setting(100, whole(1), "steps between two validations", TRAINING)
    eval_tokens: int = setting(16384, whole(1), "validation tokens looked at each time", TRAINING)
    save_every: int = setting(100, whole(1), "steps between two checkpoints", TRAINING)
    sample_tokens: int = setting(200, whole(0, 65536), "length of the sampled text", TRAINING)
    sample_prompt: str = setting("def ", text(), "beginning of the sampled text", TRAINING, "TEXT")

    vocab_size: int = setting(
        2048, whole(257, MOST_VOCABULARY),  # 256 bytes and the end of a text
        "tokens of the byte-level BPE vocabulary", MODEL,
    )  # fmt: skip
    hidden_size: int = setting(256, whole(1), "width of the model", MODEL)
    intermediate_size: int = setting(128, whole(1), "width of one expert", MODEL)
    layers: int = setting(4, whole(1, 1000), "decoder layers", MODEL)
    heads: int = setting(4, whole(1), "attention heads", MODEL)
    num_experts: int = setting(32, whole(1), "experts in a layer", MODEL)
    top_k: int = setting(4, whole(1), "experts per token", MODEL)

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.accumulate * self.tokens_per_batch

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


RULES: dict[str, Rule] = rules_of(TrainConfig)


def validate(config: TrainConfig, place: str = "") -> None:
    """Raises UserError for the first setting that cannot work; `place` is the file it came from,
    empty for the command line."""

    def named(field: str) -> str:
        return f"{place}: {field}" if place else flag_of(field)

    for field, rule in RULES.items():
        rule.check(named(field), getattr(config, field))
    if config.top_k > config.num_experts:
        raise UserError(
            f"{named('top_k')} {config.top_k} is more than {flag_of('num_experts')} "
            f"{config.num_experts}"
        )
    if config.hidden_size % (2 * config.heads):
        raise UserError(
            f"{named('hidden_size')} {config.hidden_size} must be a multiple of twice --heads "
            f"({config.heads})"
        )
    if config.router == "token-rounding":
        if config.experts != "sonicmoe_cpp":
            raise UserError(
                f"{named('router')} token-rounding needs --experts sonicmoe_cpp, "
                f"not {config.experts}"
            )
        if config.tile > config.tokens_per_batch:
            raise UserError(
                f"{named('tile')} {config.tile} is larger than the {config.tokens_per_batch} "
                f"tokens of a batch"
            )


def latest_run(runs_dir: str) -> str:
    """The run whose checkpoint is the newest. What a killed start left has a hidden name."""
    try:
        links = [path for path in Path(runs_dir).glob("*/checkpoint") if path.is_symlink()]
        times = {path.parent.name: path.lstat().st_mtime_ns for path in links}
    except OSError as error:
        raise UserError(f"--resume: cannot read {runs_dir}: {error.strerror}") from error
    runs = [name for name in times if NAME.accepts(name)]
    if not runs:
        raise UserError(f"--resume: there is no run in {runs_dir}/")
    return max(runs, key=times.get)


def read_config(run_dir: Path) -> tuple[TrainConfig, str]:
    """The configuration of an existing run and the digest of its text."""
    if not os.path.isdir(run_dir):
        raise UserError(f"--resume: there is no run {run_dir}")
    place = run_dir / "config.json"
    fields = check_fields(
        RULES | {"data_digest": DIGEST}, read_json(place, "--resume: "), f"--resume: {place}"
    )
    digest = fields.pop("data_digest")
    config = TrainConfig(**fields)
    validate(config, f"--resume: {place}")
    return config, digest
