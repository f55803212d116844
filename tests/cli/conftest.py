"""The command under test: SONICMOE_CLI, or build/cli/sonicmoe of this repository."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> str:
    """The path of the command."""
    path = Path(os.environ.get("SONICMOE_CLI", REPOSITORY / "build" / "cli" / "sonicmoe"))
    assert path.is_file(), f"{path} is missing: build the command or set SONICMOE_CLI"
    return str(path.resolve())


@pytest.fixture(scope="session")
def sonicmoe(command) -> Run:
    """Runs the command with arguments, and with environment variables as keywords."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [word if isinstance(word, bytes) else str(word) for word in arguments]
        return subprocess.run(
            [command, *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            env={**os.environ, **environment},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Asserts status 2, nothing on stdout and one line on stderr with every one of `words`."""

    def check(result: subprocess.CompletedProcess[str], *words: str) -> str:
        told = f"{result.args[1:]} gives {result.returncode}: {result.stdout[:200]}{result.stderr}"
        assert (result.returncode, result.stdout) == (2, ""), told
        assert result.stderr.startswith("sonicmoe: "), told
        assert result.stderr.endswith("\n") and len(result.stderr.splitlines()) == 1, told
        assert all(word in result.stderr for word in words), told
        return result.stderr

    return check
