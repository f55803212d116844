"""Puts the package in the tree on the path, before any installed one, and the runner of ranks."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "bindings/torch")]
