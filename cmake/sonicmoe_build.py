"""The build of the Python package: scikit-build-core, told where torch and oneDNN are.

A build needs torch's headers, of any torch >= 2.10: its stable ABI makes one build serve all. Where
pip or uv build in an environment of their own, the torch of the user's environment is taken; a
machine without one downloads it for the build.
"""

import importlib.metadata
import os
import re
import site
import sys
from collections.abc import Iterator
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_OLDEST_TORCH = (2, 10)


def _prefixes() -> Iterator[Path]:
    """Environments whose torch may be used: that of the build, the active ones, the project's, the
    interpreter's."""
    yield Path(sys.prefix)
    yield from (
        Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ
    )
    yield from (
        Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder
    )
    yield Path.cwd() / ".venv"
    yield Path(sys.base_prefix)
    yield Path(site.getuserbase())


def _version(torch: Path) -> tuple[int, ...]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return tuple(map(int, found.groups())) if found else ()


def _find_torch() -> Path | None:
    """The folder of a torch to build against, in the first environment that has one."""
    for prefix in _prefixes():
        for torch in prefix.glob("lib*/python3*/*-packages/torch"):
            if (torch / "version.py").exists() and _version(torch) >= _OLDEST_TORCH:
                return torch
    return None


def _find_onednn() -> Path | None:
    """The CMake folder of the oneDNN among the build requirements."""
    try:
        files = importlib.metadata.files("onednn-devel-cpu-gomp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next(
        (Path(f.locate()).resolve().parent for f in files if f.name == "dnnl-config.cmake"), None
    )


def _settings(given: dict | None) -> dict:
    settings = dict(given or {})
    torch, onednn = _find_torch(), _find_onednn()
    if torch is not None:
        settings.setdefault("cmake.define.SONICMOE_TORCH_ROOT", str(torch))
    if onednn is not None:
        settings.setdefault("cmake.define.dnnl_DIR", str(onednn))
        settings.setdefault("cmake.define.SONICMOE_BUNDLE_ONEDNN", "ON")
    return settings


def _torch_requirement() -> list[str]:
    return [] if _find_torch() else ["torch>={}.{}".format(*_OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _build.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _build.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _build.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    return _build.build_editable(wheel_directory, _settings(config_settings), metadata_directory)
