"""A run's folder, and checkpoints that survive a kill at any moment.

    runs/NAME/config.json              settings of the run
    runs/NAME/metrics.jsonl            one line per step
    runs/NAME/checkpoints/step-000200  weights in Qwen3-MoE names, tokenizer, trainer.pt
    runs/NAME/checkpoint               symbolic link to the last good one

A checkpoint is written to a temporary folder, brought to the disk, and renamed; only then the link
is replaced, in one atomic step, and the folder before it removed. A new run is put together in a
hidden folder and renamed when its first checkpoint is complete, so runs/NAME never lacks one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from .config import TrainConfig, UserError

LINK = "checkpoint"


@dataclasses.dataclass
class TrainerState:
    """What a checkpoint holds besides weights and tokenizer."""

    step: int  # steps done; the position in the data follows from it
    optimizer: dict
    torch_rng: torch.Tensor
    cuda_rng: list[torch.Tensor]
    best_speed: float = 0.0


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def save(
    run_dir: Path,
    state: TrainerState,
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Writes the checkpoint of state.step; the one before it stays until this one is complete."""
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    if final.exists() and (run_dir / LINK).resolve() == final.resolve():
        return
    remove_incomplete(run_dir)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(dataclasses.asdict(state), temporary / "trainer.pt")
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    os.chmod(temporary, 0o755)
    os.rename(temporary, final)
    sync(folder)
    new_link = run_dir / f".{LINK}.tmp"
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(final.relative_to(run_dir))
    os.replace(new_link, run_dir / LINK)
    sync(run_dir)
    remove_incomplete(run_dir)


def remove_incomplete(run_dir: Path) -> None:
    """Removes every checkpoint but the one the link names: older ones and half-written ones."""
    good = (run_dir / LINK).resolve()
    for path in (run_dir / "checkpoints").iterdir():
        if path.resolve() != good:
            shutil.rmtree(path)


def load_state(run_dir: Path) -> TrainerState:
    try:
        fields = torch.load(run_dir / LINK / "trainer.pt", map_location="cpu", weights_only=True)
        return TrainerState(**fields)
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        raise _unreadable(run_dir, "trainer.pt", error) from error


def load_model(run_dir: Path, config: TrainConfig) -> Qwen3MoeForCausalLM:
    """The checkpoint's model, provided that it has the shape the run's configuration says."""
    folder = run_dir / LINK
    try:
        model, report = Qwen3MoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise _unreadable(run_dir, "weights", error) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise UserError(
                f"--resume: the checkpoint in {folder} does not fit its config.json: "
                f"{problem.replace('_', ' ')} such as {example}"
            )
    shape = {
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "num_experts": "num_experts",
        "top_k": "num_experts_per_tok",
        "intermediate_size": "moe_intermediate_size",
    }
    for ours, theirs in shape.items():
        if getattr(config, ours) != getattr(model.config, theirs):
            raise UserError(
                f"--resume: the checkpoint in {folder} has {theirs} "
                f"{getattr(model.config, theirs)}, the run's config.json says "
                f"{getattr(config, ours)}"
            )
    return model


def load_tokenizer(run_dir: Path) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(run_dir / LINK)
    except Exception as error:
        raise _unreadable(run_dir, "tokenizer", error) from error


def _unreadable(run_dir: Path, what: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"--resume: cannot read the checkpoint {run_dir / LINK}: {what}: {reason}")


def write_config(run_dir: Path, config: TrainConfig, data_digest: str) -> None:
    fields = {**dataclasses.asdict(config), "data_digest": data_digest}
    write_atomically(run_dir / "config.json", json.dumps(fields, indent=2) + "\n")


def read_config(run_dir: Path) -> tuple[TrainConfig, str]:
    """The configuration of an existing run and the digest of its text."""
    if not run_dir.is_dir():
        raise UserError(f"--resume: there is no run {run_dir}")
    try:
        fields = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        digest = fields.pop("data_digest")
        return TrainConfig(**fields), digest
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--resume: cannot read {run_dir / 'config.json'}: {error}") from error


def check_free(run_dir: Path, overwrite: bool) -> None:
    """Refuses a name that is taken, and never lets --overwrite replace what is not a run."""
    if not os.path.lexists(run_dir):
        return
    if not overwrite:
        raise UserError(
            f"run {run_dir} exists: --resume continues it, --overwrite replaces it, "
            f"--name NAME starts another"
        )
    if not (run_dir / "config.json").is_file() or not (run_dir / LINK).exists():
        raise UserError(f"--overwrite: {run_dir} is not a run of this program")


@contextlib.contextmanager
def new_run(run_dir: Path):
    """A hidden folder to put a new run together in; removed unless published."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.new-", dir=run_dir.parent))
    os.chmod(folder, 0o755)
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def publish(folder: Path, run_dir: Path) -> None:
    """Gives a new run its name. A run that it replaces is removed only afterwards."""
    old = None
    if run_dir.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.old-", dir=run_dir.parent))
        with exclusive(run_dir):
            os.rename(run_dir, old / run_dir.name)
    os.rename(folder, run_dir)
    sync(run_dir.parent)
    if old:
        shutil.rmtree(old)


@contextlib.contextmanager
def exclusive(run_dir: Path):
    """Keeps two processes from writing into one run."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"run {run_dir} is being trained by another process") from error
    finally:
        os.close(descriptor)
