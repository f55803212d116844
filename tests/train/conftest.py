"""Runs the trainer in this process on a tiny model and a few kilobytes of text."""

import os
import random
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[2]
for folder in ("examples", "bindings/torch"):
    sys.path.insert(0, str(ROOT / folder))

TINY = {
    "--vocab-size": 280, "--hidden-size": 32, "--intermediate-size": 16, "--layers": 2,
    "--heads": 2, "--num-experts": 8, "--top-k": 2, "--batch-size": 2, "--seq-len": 32,
    "--eval-tokens": 128, "--sample-tokens": 8, "--steps": 6, "--eval-every": 3, "--tile": 8,
    "--threads": 1, "--name": "run",
}  # fmt: skip


@pytest.fixture
def text_folder(tmp_path):
    """Twelve files of made-up sentences."""
    words = ["the", "expert", "router", "token", "rounds", "drops", "keeps", "adds", "row"]
    folder = tmp_path / "text"
    folder.mkdir()
    chance = random.Random(5)
    for index in range(12):
        sentences = (" ".join(chance.choices(words, k=9)) + ".\n" for _ in range(40))
        (folder / f"file{index}.txt").write_text("".join(sentences))
    return folder


@pytest.fixture
def flags(tmp_path, text_folder):
    """Builds a command line: tiny defaults, changed by keyword; None leaves a flag out."""

    def build(*switches, **changes):
        values = {**TINY, "--data": text_folder, "--runs-dir": tmp_path / "runs"}
        values.update({"--" + key.replace("_", "-"): value for key, value in changes.items()})
        pairs = [[flag, str(value)] for flag, value in values.items() if value is not None]
        return [item for pair in pairs for item in pair] + list(switches)

    return build


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "run"
