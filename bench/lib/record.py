"""What the Python benchmarks share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit that is measured; "+" after it when tracked files differ from it. Where the tree
    came without its history, SONICMOE_COMMIT tells."""
    if "SONICMOE_COMMIT" in os.environ:
        return os.environ["SONICMOE_COMMIT"]
    run = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changes = subprocess.run([*run, "diff", "--quiet", "HEAD"], check=False)
    return head.stdout.strip() + ("+" if changes.returncode else "")
