"""Installs the wheel into fresh environments and runs quick tests there, away from the sources.

    python tests/install/try_wheel.py dist/*.whl

The Python that runs this script gets torch and the tests; of the others on this machine, each must
take the wheel and compile its files.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = re.search(r"^torch==\S+", (ROOT / "requirements.in").read_text(), re.M).group()
TESTS = ("test_layer.py", "test_import.py", "test_exit.py", "test_options.py")
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LOOK = """
import torch, sonicmoe_cpp as sm
print(sm.__file__)
for backend in sm.backends(): print(backend)
assert {b.name: b.available for b in sm.backends()}["cpu"]
for dtype in (torch.float32, torch.bfloat16):
    layer = sm.MoE(64, 32, 8, 2, dtype=dtype)
    layer(torch.randn(16, 64, dtype=dtype)).float().sum().backward()
    assert layer.experts.w1.grad.abs().sum() > 0
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
named = lambda part: [path for path in libraries if part in path]
assert not named("libdnnl.so"), "oneDNN of the system"
assert len(named("libsonicmoe_dnnl")) == 1 and len(named("libgomp")) == 1, libraries
"""


def run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def environment(folder, python):
    """A new virtual environment's Python."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python, *packages):
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)


def try_here(wheel, work):
    """torch, the wheel, and the quick tests; no compiler and no source in sight."""
    python = environment(work / "here", sys.executable)
    install(python, TORCH, "numpy", "pytest", "pytest-timeout", wheel)
    shutil.copytree(ROOT / "tests" / "torch", work / "away" / "tests" / "torch")
    bare = {"PATH": str(python.parent), "HOME": str(work), "OMP_NUM_THREADS": "2"}
    run(python, "-c", LOOK, cwd=work, env=bare)
    tests = [f"tests/torch/{name}" for name in TESTS]
    run(python, "-m", "pytest", "-q", "--timeout", 300, *tests, cwd=work / "away", env=bare)


def try_other(wheel, work, name, interpreter):
    python = environment(work / name, interpreter)
    install(python, "--no-deps", wheel)
    package = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], text=True
    ).strip()
    run(python, "-m", "compileall", "-q", "-f", Path(package) / "sonicmoe_cpp")
    print(f"{name}: takes the wheel")


def pythons():
    """One interpreter of each version that is on PATH or among pyenv's."""
    for version in VERSIONS:
        name = f"python{version}"
        pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/{name}"))
        for path in filter(None, (shutil.which(name), *pyenv)):
            # pyenv's stand-ins on PATH answer for the active version alone
            if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
                yield name, path
                break


def main():
    wheel = Path(sys.argv[1]).resolve(strict=True)
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        try_here(wheel, Path(folder))
        for name, python in pythons():
            try_other(wheel, Path(folder), name, python)


if __name__ == "__main__":
    main()
