"""Reading a checkpoint back, provided that it is whole and fits its run. All errors are UserError."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from . import files
from .checkpoint import LINK, SUMS, TrainerState, last_step
from .config import TrainConfig
from .schema import Rule, UserError, check_fields, instance_of, whole

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_RULES = {
    "step": whole(),
    "optimizer": Rule(
        "an optimizer's state",
        lambda value: type(value) is dict and type(value.get("state")) is dict,
    ),
    "torch_rng": instance_of(Tensor, "a tensor"),
    "cuda_rng": instance_of((Tensor, type(None)), "a tensor or None"),
}


def verify(run_dir: Path) -> None:
    """UserError unless the link names a folder that holds exactly what was written, by SHA-256."""
    folder = run_dir / LINK
    if last_step(run_dir) is None:
        raise UserError(f"--resume: {folder}: expected a link to a folder checkpoints/step-NUMBER")
    try:
        lines = files.read_bytes(folder / SUMS, most=1 << 20).decode().splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        names = {path.name for path in folder.iterdir()} - {SUMS}
        for name in sorted(sums.keys() ^ names):
            raise _unreadable(run_dir, name, "missing" if name in sums else f"not in {SUMS}")
        for name, digest in sums.items():
            files.check_regular(folder / name)
            if files.sha256(folder / name) != digest:
                raise _unreadable(run_dir, name, f"damaged: its SHA-256 is not that of {SUMS}")
    except OSError as error:
        name = Path(error.filename or SUMS).name
        raise _unreadable(run_dir, name, files.reason(error)) from error
    except ValueError as error:
        raise _unreadable(run_dir, SUMS, "not lines of a digest and a name") from error


def load_state(run_dir: Path) -> TrainerState:
    try:
        fields = torch.load(run_dir / LINK / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise _unreadable(run_dir, "trainer.pt", files.reason(error)) from error
    place = f"--resume: {run_dir / LINK / 'trainer.pt'}"
    state = TrainerState(**check_fields(STATE_RULES, fields, place))
    if state.step != last_step(run_dir):
        raise UserError(f"{place}: step: expected {last_step(run_dir)}, got {state.step}")
    return state


def moments_of(state: TrainerState, shapes: list[torch.Size]) -> dict[int, dict[str, Tensor]]:
    """AdamW's state per parameter, provided that it is whole and finite; empty before the first step."""
    moments = state.optimizer["state"]
    place = "--resume: trainer.pt: optimizer"
    indices = list(range(len(shapes))) if state.step else []
    if moments.keys() != set(indices):
        raise UserError(
            f"{place}: expected the moments of {len(indices)} parameters, not {len(moments)}"
        )
    for index in indices:
        of_one = moments[index]
        if type(of_one) is not dict or of_one.keys() != {"step", *MOMENTS}:
            raise UserError(f"{place}: expected step, {' and '.join(MOMENTS)} of parameter {index}")
        for name, shape in zip(("step", *MOMENTS), ((), shapes[index], shapes[index]), strict=True):
            tensor = of_one[name]
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                raise UserError(f"{place}: {name} of parameter {index}: expected a float32 tensor")
            if tensor.shape != torch.Size(shape) or not tensor.isfinite().all():
                raise UserError(
                    f"{place}: {name} of parameter {index}: expected finite values of shape "
                    f"{list(shape)}, got shape {list(tensor.shape)}"
                )
        if int(of_one["step"]) != state.step:
            raise UserError(f"{place}: step of parameter {index}: expected {state.step}")
    return moments


# Of the run's configuration, by their names in the checkpoint's.
SHAPE = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
}


def load_model(run_dir: Path, config: TrainConfig) -> Qwen3MoeForCausalLM:
    """The checkpoint's model, provided that it has the shape the run's configuration says: that is looked
    at before anything of that shape is allocated."""
    folder = run_dir / LINK
    try:
        saved = Qwen3MoeConfig.from_pretrained(folder)
    except Exception as error:
        raise _unreadable(run_dir, "config.json", files.reason(error)) from error
    for ours, theirs in SHAPE.items():
        wanted, found = getattr(config, ours), getattr(saved, theirs)
        if wanted != found:
            raise UserError(
                f"--resume: the checkpoint in {folder} has {theirs} {found}, the run's config.json "
                f"says {wanted}"
            )
    try:
        model, report = Qwen3MoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise _unreadable(run_dir, "weights", files.reason(error)) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise _unreadable(run_dir, "weights", f"{problem.replace('_', ' ')} such as {example}")
    return model


def load_tokenizer(run_dir: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(run_dir / LINK)
    except Exception as error:
        raise _unreadable(run_dir, "tokenizer", files.reason(error)) from error


def _unreadable(run_dir: Path, name: str, reason: str) -> UserError:
    return UserError(f"--resume: cannot use the checkpoint {run_dir / LINK}: {name}: {reason}")
