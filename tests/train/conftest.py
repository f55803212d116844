"""Runs the trainer in this process on a tiny model and a few kilobytes of text."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[2]
for folder in (".", "bindings/torch"):
    sys.path.insert(0, str(ROOT / folder))

TINY = {
    "--vocab-size": 280, "--hidden-size": 32, "--intermediate-size": 16, "--layers": 2,
    "--heads": 2, "--num-experts": 8, "--top-k": 2, "--batch-size": 2, "--seq-len": 32,
    "--eval-tokens": 128, "--sample-tokens": 8, "--steps": 6, "--eval-every": 3, "--tile": 8,
    "--threads": 1, "--name": "run",
}  # fmt: skip


def write_text(folder):
    """Twelve files of made-up sentences."""
    words = ["the", "expert", "router", "token", "rounds", "drops", "keeps", "adds", "row"]
    folder.mkdir()
    chance = random.Random(5)
    for index in range(12):
        sentences = (" ".join(chance.choices(words, k=9)) + ".\n" for _ in range(40))
        (folder / f"file{index}.txt").write_text("".join(sentences))
    return folder


@pytest.fixture
def text_folder(tmp_path):
    return write_text(tmp_path / "text")


def command_line(folder, *switches, **changes):
    """Tiny defaults, changed by keyword; None leaves a flag out."""
    values = {**TINY, "--data": folder / "text", "--runs-dir": folder / "runs"}
    values.update({"--" + key.replace("_", "-"): value for key, value in changes.items()})
    pairs = [[flag, str(value)] for flag, value in values.items() if value is not None]
    return [item for pair in pairs for item in pair] + list(switches)


@pytest.fixture
def flags(tmp_path, text_folder):
    return lambda *switches, **changes: command_line(tmp_path, *switches, **changes)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with a text and the finished run of four steps on it, to be copied."""
    from trainer.train import main

    folder = tmp_path_factory.mktemp("finished")
    write_text(folder / "text")
    assert main(command_line(folder, steps=4)) == 0
    return folder


@pytest.fixture
def damaged(finished, run_dir):
    """A copy of the finished run, to be damaged. Its text stays where it was."""
    shutil.copytree(finished / "runs" / "run", run_dir, symlinks=True)
    return run_dir


def contents(folder):
    """Of every file and link below the folder, or the size of a huge one; the names of all else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.readlink() if path.is_symlink() else None
        if kind is None and path.is_file():
            size = path.stat().st_size
            kind = path.read_bytes() if size < 1 << 24 else size
        found[str(path.relative_to(folder))] = kind
    return found


@pytest.fixture
def refuse(capsys):
    """Asserts that a program answers with one line that holds the words, and with that exit
    code."""
    from trainer.train import main

    def check(argv, *words, entry=main, code=2):
        capsys.readouterr()
        assert entry(list(map(str, argv))) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ": error: " in error and "Traceback" not in error
        for word in words:
            assert word in error
        return error

    return check


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "run"
