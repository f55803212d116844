"""The Makefile and scripts/setup.sh in folders with awkward names: every command gets whole
paths."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Stands for every tool: writes down what it was called with, and succeeds.
TOOL = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    known = ("PYTHONPATH", "SONICMOE_CLI", "PYTHON")
    call = {{"argv": sys.argv, **{{name: os.environ.get(name, "") for name in known}}}}
    calls.write(json.dumps(call) + "\\n")
"""


class Project:
    def __init__(self, root):
        self.root, self.calls = root, root.parent / "calls"
        self.tools = root.parent.parent / "tools"
        self.tools.mkdir()
        root.mkdir(parents=True)
        for name in ("Makefile", "requirements.in", "requirements.txt"):
            shutil.copy(REPOSITORY / name, root)
        shutil.copytree(REPOSITORY / "scripts", root / "scripts")
        for tool in ("cmake", "ctest", "dpkg-query", "git", "nvidia-smi"):
            self.stand_in(self.tools / tool)
        (self.tools / "dpkg-query").write_text("#!/bin/sh\necho install ok installed\n")
        self.stand_in(root / ".venv" / "bin" / "python")
        (root / "build" / "cli").mkdir(parents=True)

    @staticmethod
    def stand_in(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOOL.format(python=sys.executable))
        path.chmod(0o755)

    def make(self, target):
        """What `make target` called, in order."""
        self.calls.write_text("")
        environment = {**os.environ, "PATH": f"{self.tools}:{os.environ['PATH']}"}
        environment["CALLS"] = str(self.calls)
        environment.pop("SONICMOE_APT", None)
        for name in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "PYTHON", "BUILD", "PWD"):
            environment.pop(name, None)
        done = subprocess.run(
            ["make", target], cwd=self.root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def plain(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    return Project(tmp_path / "plain" / "sonicmoe")


@pytest.fixture(params=["plain", "My Projects", "it's $HOME (new) & *", "$(HOME) `id` ; #1"])
def project(request, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    return Project(tmp_path / request.param / "sonicmoe")


def test_setup_asks_the_environments_own_python(project):
    calls = project.make("setup")
    assert [call["argv"][:4] for call in calls] == 2 * [
        [".venv/bin/python", "-m", "pip", "install"]
    ]
    assert (project.root / ".venv" / ".ready").is_file()
    assert project.make("setup") == []  # and does so once


@pytest.mark.parametrize(
    ("target", "module"),
    [("train", "trainer.train"), ("compare", "trainer.compare"), ("test-python", "pytest")],
)
def test_commands_keep_the_folder_in_one_word(project, target, module):
    root = str(project.root)
    calls = project.make(target)
    python = f"{root}/.venv/bin/python"
    (configure,) = (c for c in calls if c["argv"][1:3] == ["-S", "."])
    assert f"-DPython3_EXECUTABLE={python}" in configure["argv"]
    last = calls[-1]
    assert last["argv"][:3] == [python, "-m", module]
    assert last["PYTHONPATH"] == f"{root}/bindings/torch:{root}"
    if target == "test-python":
        assert last["SONICMOE_CLI"] == f"{root}/build/cli/sonicmoe"


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("target", ["train", "compare"])
def test_training_builds_the_operators_alone(plain, target, gpu):
    if not gpu:
        (plain.tools / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    calls = [c["argv"] for c in plain.make(target)]
    (configure,) = (argv for argv in calls if argv[1:3] == ["-S", "."])
    assert configure[3:5] == ["-B", "build-train"]
    assert {"-DSONICMOE_BUILD_CLI=OFF", "-DSONICMOE_BUILD_TESTS=OFF"} < set(configure)
    assert ("-DSONICMOE_CUDA=OFF" in configure) == (not gpu)
    (build,) = (argv for argv in calls if argv[1] == "--build")
    assert build[2:5] == ["build-train", "--target", "sonicmoe_torch"]


def test_training_takes_the_build_that_is_there(plain):
    (plain.root / "build" / "CMakeCache.txt").touch()
    calls = [c["argv"] for c in plain.make("train")]
    (configure,) = (argv for argv in calls if argv[1:3] == ["-S", "."])
    assert configure[3:5] == ["-B", "build"]
    assert not [option for option in configure if option.endswith("=OFF")]
    (build,) = (argv for argv in calls if argv[1] == "--build")
    assert build[2:5] == ["build", "--target", "sonicmoe_torch"]


def test_everything_is_built_by_name_of_no_target(plain):
    calls = [c["argv"] for c in plain.make("build")]
    (configure,) = (argv for argv in calls if argv[1:3] == ["-S", "."])
    assert not [option for option in configure if option.endswith("=OFF")]
    (build,) = (argv for argv in calls if argv[1] == "--build")
    assert "--target" not in build


def test_clean_removes_the_builds_alone(project):
    for name in ("build/x", "build-asan/x", "builder/x", "src/x"):
        (project.root / name).parent.mkdir(exist_ok=True)
        (project.root / name).touch()
    project.make("clean")
    left = {path.name for path in project.root.iterdir() if path.is_dir()}
    assert left == {"scripts", ".venv", "builder", "src"}
