"""Reading a checkpoint back, provided that it is whole and fits its run. All errors are
UserError."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from . import data, files
from .checkpoint import LINK, SUMS, TrainerState, last_step, settings_of
from .config import CHANGEABLE_ON_RESUME, TrainConfig
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


def check_settings(state: TrainerState, config: TrainConfig, digest: str) -> None:
    """UserError where config.json no longer says what the run was trained with. Text may move: its
    digest is what counts."""
    free = {"name", "runs_dir", "data", *CHANGEABLE_ON_RESUME}
    for field, value in settings_of(config, digest).items():
        trained = state.settings.get(field)
        if field not in free and value != trained:
            raise UserError(
                f"--resume: {config.run_dir / 'config.json'}: {field}: expected {trained}, "
                f"with which the checkpoint was made, got {value}"
            )


def moments_of(state: TrainerState, shapes: list[torch.Size]) -> dict[int, dict[str, Tensor]]:
    """AdamW's state per parameter, provided that it is whole and finite; empty before the first
    step."""
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
            kind = (tensor.dtype, tensor.device.type) if isinstance(tensor, Tensor) else None
            if kind != (torch.float32, "cpu"):
                raise UserError(f"{place}: {name} of parameter {index}: expected a float32 tensor")
            if tensor.shape != torch.Size(shape) or not tensor.isfinite().all():
                raise UserError(
                    f"{place}: {name} of parameter {index}: expected finite values of shape "
                    f"{list(shape)}, got shape {list(tensor.shape)}"
                )
        if int(of_one["step"]) != state.step:
            raise UserError(f"{place}: step of parameter {index}: expected {state.step}")
    return moments


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


def _unreadable(run_dir: Path, name: str, reason: str) -> UserError:
    return UserError(f"--resume: cannot use the checkpoint {run_dir / LINK}: {name}: {reason}")
