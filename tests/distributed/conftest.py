"""Puts the package in the tree on the path, before any installed one, the runner of ranks and what
the tests of one process share."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(folder)
    for folder in (Path(__file__).parent, REPOSITORY / "bindings/torch", REPOSITORY / "tests/torch")
]
