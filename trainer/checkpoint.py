"""A run's folder, and checkpoints that survive a kill at any moment.

    runs/NAME/config.json              settings of the run, and the digest of its text
    runs/NAME/metrics.jsonl            one line per step
    runs/NAME/checkpoints/step-000200  weights in Qwen3-MoE names, tokenizer, optimizer/ (moments),
                                       trainer.json, SHA256SUMS
    runs/NAME/checkpoint               symbolic link to the last good one

Of several processes the first does all of this; each writes the moments that it holds.
A checkpoint is written to a temporary folder, brought to the disk, and renamed; only then the link
is replaced, in one atomic step, and the folder before it removed. A new run is put together in a
hidden folder and renamed when its first checkpoint is complete, so runs/NAME never lacks one. What
a killed start leaves is removed by the next start. restore.py reads a checkpoint back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from . import files, moments, parallel
from .config import TrainConfig
from .files import sync
from .group import Group, is_lost_connection
from .schema import UserError

LINK, SUMS, PROGRESS = "checkpoint", "SHA256SUMS", "trainer.json"
STEP = re.compile(r"step-(\d{6,})")
HIDDEN = re.compile(r"\.(?P<name>.+)\.(new|old)-[a-z0-9_]{8}")


@dataclasses.dataclass
class Content:
    """What a checkpoint holds. Weights and moments go by the parameters' names in transformers."""

    step: int  # steps done; the position in the data and all random numbers follow from it
    settings: dict  # as config.json has them
    model: Qwen3MoeForCausalLM
    moments: dict[str, Tensor]  # AdamW's; parts of them where they are sharded
    tokenizer: PreTrainedTokenizerFast


# ------------------------------------------------------------------------------------- a checkpoint


def save(run_dir: Path, content: Content, group: Group) -> None:
    """Writes the checkpoint of content.step; the one before it stays until this one is complete.
    OSError, which names that one, where this one cannot be written; nothing is then left of it.
    Collective."""
    final = run_dir / "checkpoints" / f"step-{content.step:06d}"
    if group.share(lambda: last_step(run_dir)) == content.step:
        return
    with contextlib.ExitStack() as stack:
        try:
            temporary = group.share(lambda: _begin(run_dir, stack))
            if content.moments:
                moments.save(temporary / moments.FOLDER, content.moments, group)
            weights = parallel.gathered(content.model, group)
            group.share(lambda: _complete(run_dir, temporary, final, content, weights))
        except Exception as error:  # torch raises RuntimeError, safetensors its own
            if is_lost_connection(error):
                raise
            reason = files.reason(files.system_error(error))
            free = shutil.disk_usage(run_dir).free >> 20
            raise OSError(
                f"cannot write the checkpoint {final}: {reason} ({free} MiB free there); "
                f"{last_good(run_dir)}"
            ) from error


def _begin(run_dir: Path, stack: contextlib.ExitStack) -> Path:
    """A temporary folder, removed with the stack unless it has another name by then."""
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    remove_incomplete(run_dir)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    stack.callback(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _complete(
    run_dir: Path, temporary: Path, final: Path, content: Content, weights: dict[str, Tensor]
) -> None:
    _write(temporary, content, weights)
    os.rename(temporary, final)
    sync(final.parent)
    _link(run_dir, final)
    remove_incomplete(run_dir)


def _write(folder: Path, content: Content, weights: dict[str, Tensor]) -> None:
    """All but the moments, and the sums of all."""
    content.model.save_pretrained(folder, state_dict=weights)
    content.tokenizer.save_pretrained(folder)
    progress = {"step": content.step, "settings": content.settings}
    (folder / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n")
    paths = files.below(folder)
    sums = (f"{files.sha256(path)}  {path.relative_to(folder)}\n" for path in paths)
    (folder / SUMS).write_text("".join(sums))
    for path in (*paths, folder / SUMS, folder / moments.FOLDER, folder):
        if path.exists():
            sync(path)
    os.chmod(folder, 0o755)


def _link(run_dir: Path, final: Path) -> None:
    new_link = run_dir / f".{LINK}.tmp"
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(final.relative_to(run_dir))
    os.replace(new_link, run_dir / LINK)
    sync(run_dir)


def remove_incomplete(run_dir: Path) -> None:
    """Removes every checkpoint but the one the link names: older ones and half-written ones. What
    else lies there is somebody else's."""
    good = last_step(run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        step = STEP.fullmatch(path.name)
        old = step and good is not None and int(step[1]) != good
        if (old or path.name.startswith(".writing-")) and path.is_dir():
            shutil.rmtree(path)


def last_step(run_dir: Path) -> int | None:
    """The step of the checkpoint that the link names; None where there is no such link."""
    try:
        folder, name = os.path.split(os.readlink(run_dir / LINK))
    except OSError:
        return None
    step = STEP.fullmatch(name)
    return int(step[1]) if step and folder == "checkpoints" else None


def last_good(run_dir: Path) -> str:
    step = last_step(run_dir)
    if step is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint, of step {step}, is kept"


# ----------------------------------------------------------------------------------- a run's folder


def settings_of(config: TrainConfig, data_digest: str) -> dict:
    """What config.json holds."""
    return {**dataclasses.asdict(config), "data_digest": data_digest}


def write_config(run_dir: Path, config: TrainConfig, data_digest: str) -> None:
    content = json.dumps(settings_of(config, data_digest), indent=2)
    files.write_text(run_dir / "config.json", content + "\n")


def check_free(run_dir: Path, overwrite: bool) -> None:
    """Refuses a name that is taken, and never lets --overwrite replace what is not a run, or one at
    work."""
    if not os.path.lexists(run_dir):
        return
    if not overwrite:
        raise UserError(
            f"run {run_dir} exists: --resume continues it, --overwrite replaces it, "
            f"--name NAME starts another"
        )
    if not (run_dir / "config.json").is_file() or last_step(run_dir) is None:
        raise UserError(f"--overwrite: {run_dir} is not a run of this program")
    with exclusive(run_dir):
        pass


@contextlib.contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps two processes from writing into one folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"run {folder} is being trained by another process") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_run(run_dir: Path) -> Iterator[Path]:
    """A hidden, locked folder to put a new run together in; removed unless published. UserError
    where --runs-dir cannot be written."""
    parent = run_dir.parent
    if last_step(parent) is not None:
        raise UserError(f"--runs-dir: expected a folder of runs, got the run {parent}")
    with contextlib.ExitStack() as stack:
        try:
            if not parent.exists():
                parent.mkdir(parents=True)
                stack.callback(_remove_if_empty, parent)
            with exclusive(parent, wait=True):
                folder = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.new-", dir=parent))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(exclusive(folder))
        except OSError as error:
            raise UserError(
                f"--runs-dir: expected a folder that can be written, got {parent}: "
                f"{files.reason(error)}"
            ) from error
        os.chmod(folder, 0o755)
        yield folder


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_killed_starts(runs_dir: Path) -> None:
    """Removes the hidden folders that no process holds. A run that was to be replaced gets its name
    back where its successor has not come to it."""
    if not os.path.isdir(runs_dir) or last_step(runs_dir) is not None:
        return
    with exclusive(runs_dir, wait=True):
        for path in runs_dir.iterdir():
            hidden = HIDDEN.fullmatch(path.name)
            if not hidden or not path.is_dir():
                continue
            with contextlib.suppress(OSError, UserError), exclusive(path):
                name = hidden["name"]
                if (path / name).exists() and not os.path.lexists(runs_dir / name):
                    os.rename(path / name, runs_dir / name)
                shutil.rmtree(path)


def publish(folder: Path, run_dir: Path) -> None:
    """Gives a new run its name. A run that it replaces is removed only afterwards."""
    old = None
    with exclusive(run_dir.parent, wait=True):
        if run_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}.old-", dir=run_dir.parent))
            with exclusive(run_dir):
                os.rename(run_dir, old / run_dir.name)
        os.rename(folder, run_dir)
        sync(run_dir.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)
