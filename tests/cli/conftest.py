"""The command under test: SONICMOE_CLI, or build/cli/sonicmoe of this repository."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def sonicmoe() -> Run:
    path = Path(os.environ.get("SONICMOE_CLI", REPOSITORY / "build" / "cli" / "sonicmoe"))
    assert path.is_file(), f"{path} is missing: build the command or set SONICMOE_CLI"

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
            check=False,
        )

    return run
