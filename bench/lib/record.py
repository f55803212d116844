"""Records in bench/results: what is measured, where, and the command that repeats it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "bench" / "results"


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


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def new_record(device: str = "cuda", **more) -> dict:
    """The one header of all records; its rows are empty."""
    import sonicmoe_cpp
    import torch

    versions = {
        "sonicmoe_cpp": sonicmoe_cpp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "versions": versions,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **more,
        "rows": [],
    }


def write_record(record: dict, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def read_records(folder: Path = RESULTS, pattern: str = "*.json") -> list[dict]:
    """With the file's name as `file`."""
    return [
        json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob(pattern))
    ]


def newest(records: list[dict], fits: Callable[[dict], bool]) -> dict | None:
    """The latest record that `fits`."""
    dated = [record for record in records if "date" in record and fits(record)]
    return max(dated, key=lambda record: record["date"], default=None)


def has_row(key: str, value: object) -> Callable[[dict], bool]:
    """Whether a record has a row whose `key` is `value`."""
    return lambda record: any(row.get(key) == value for row in record["rows"])


def rounded(value):
    """Floats of 4 significant digits, in nested dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
