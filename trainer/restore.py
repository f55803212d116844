"""Reading a checkpoint back, provided that it is whole and fits its run. All errors are
UserError."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from . import data, files, moments, parallel
from .checkpoint import LINK, PROGRESS, SUMS, last_step, settings_of
from .config import CHANGEABLE_ON_RESUME, TrainConfig
from .group import Group
from .schema import UserError, check_fields, instance_of, read_json, whole

PROGRESS_RULES = {
    "step": whole(),
    "settings": instance_of(dict, "the settings of the run"),
}


def verify(run_dir: Path) -> None:
    """UserError unless the link names a folder that holds exactly what was written, by SHA-256."""
    folder = run_dir / LINK
    if last_step(run_dir) is None:
        raise UserError(f"--resume: {folder}: expected a link to a folder checkpoints/step-NUMBER")
    try:
        lines = files.read_bytes(folder / SUMS, most=1 << 20).decode().splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        names = {str(path.relative_to(folder)) for path in files.below(folder)} - {SUMS}
        for name in sorted(sums.keys() ^ names):
            raise _unreadable(run_dir, name, "missing" if name in sums else f"not in {SUMS}")
        for name, digest in sums.items():
            files.check_regular(folder / name)
            if files.sha256(folder / name) != digest:
                raise _unreadable(run_dir, name, f"damaged: its SHA-256 is not that of {SUMS}")
    except OSError as error:
        name = os.path.relpath(error.filename or SUMS, folder) if error.filename else SUMS
        raise _unreadable(run_dir, name, files.reason(error)) from error
    except ValueError as error:
        raise _unreadable(run_dir, SUMS, "not lines of a digest and a name") from error


def load_progress(run_dir: Path, config: TrainConfig, digest: str) -> int:
    """The step of the checkpoint. UserError where config.json no longer says what the run was
    trained with. Text may move: its digest is what counts."""
    place = run_dir / LINK / PROGRESS
    if not place.exists() and (place.parent / "trainer.pt").exists():
        raise UserError(
            f"--resume: {place.parent} was written by an earlier version of the trainer, with its "
            f"optimizer in trainer.pt: its weights load, but its training cannot go on"
        )
    fields = check_fields(PROGRESS_RULES, read_json(place, "--resume: "), f"--resume: {place}")
    step, trained = fields["step"], fields["settings"]
    if step != last_step(run_dir):
        raise UserError(f"--resume: {place}: step: expected {last_step(run_dir)}, got {step}")
    free = {"name", "runs_dir", "data", *CHANGEABLE_ON_RESUME}
    for field, value in settings_of(config, digest).items():
        if field not in free and value != trained.get(field):
            raise UserError(
                f"--resume: {config.run_dir / 'config.json'}: {field}: expected "
                f"{trained.get(field)}, with which the checkpoint was made, got {value}"
            )
    return step


def load_model(run_dir: Path, config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    """The checkpoint's weights in a model of `config`, all of them and no others."""
    try:
        model, report = Qwen3MoeForCausalLM.from_pretrained(
            run_dir / LINK,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    except Exception as error:
        raise _unreadable(run_dir, "weights", files.reason(error)) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise _unreadable(run_dir, "weights", f"{problem.replace('_', ' ')} such as {example}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise _unreadable(run_dir, "weights", f"{name} holds what is not finite")
    return model


def load_tokenizer(run_dir: Path) -> PreTrainedTokenizerFast:
    try:
        content = files.read_bytes(run_dir / LINK / "tokenizer.json").decode()
        return data.with_end_of_text(Tokenizer.from_str(content))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise _unreadable(run_dir, "tokenizer.json", files.reason(error)) from error


def load_moments(run_dir: Path, step: int, model: Qwen3MoeForCausalLM, group: Group) -> dict:
    """The optimizer's, in the layout of the model. Collective."""
    folder = run_dir / LINK / moments.FOLDER
    try:
        return moments.load(folder, step, parallel.by_stock_name(model), group)
    except UserError as error:
        raise _unreadable(run_dir, *str(error).split(": ", 1)) from error


def _unreadable(run_dir: Path, name: str, reason: str) -> UserError:
    return UserError(f"--resume: cannot use the checkpoint {run_dir / LINK}: {name}: {reason}")
