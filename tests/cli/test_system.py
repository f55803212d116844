"""Debian packages are installed when asked for, by root, and in sight; otherwise they are named."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
APT_OUTPUT = "Setting up things (1.2-3) ..."


@pytest.fixture
def system(tmp_path):
    """Runs scripts/system.sh where `id`, `dpkg-query` and `apt-get` are stand-ins; apt's calls are
    in `calls`, and what it installs is installed from then on."""
    tools, installed, calls = tmp_path / "tools", tmp_path / "installed", tmp_path / "calls"
    tools.mkdir()
    installed.touch()
    stand_ins = {
        "id": 'echo "$USER_ID"',
        "dpkg-query": f'grep -qx "${{@: -1}}" {installed} && echo install ok installed',
        "apt-get": f'echo "$@" >> {calls}; echo "{APT_OUTPUT}"; '
        f'for word in "${{@:3}}"; do echo "$word" >> {installed}; done',
    }
    for name, body in stand_ins.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    class System:
        missing = re.search(r"packages=\((.*?)\)", script(), re.DOTALL)[1].split()

        def run(self, *arguments, root, **environment):
            return subprocess.run(
                ["bash", REPOSITORY / "scripts" / "system.sh", *arguments],
                env={
                    "PATH": f"{tools}:{os.environ['PATH']}",
                    "USER_ID": "0" if root else "1000",
                    **environment,
                },
                capture_output=True,
                text=True,
            )

        def have(self, *packages):
            installed.write_text("".join(f"{package}\n" for package in packages))

        def apt(self):
            return calls.read_text().splitlines() if calls.exists() else []

    return System()


def script():
    return (REPOSITORY / "scripts" / "system.sh").read_text()


@pytest.mark.parametrize("root", [True, False])
def test_what_is_missing_is_named_and_not_installed(system, root):
    present, *missing = system.missing
    system.have(present)
    done = system.run(root=root)
    assert done.returncode == 1
    assert system.apt() == []
    sudo = "" if root else "sudo "
    assert f"missing Debian packages: {' '.join(missing)}\n" in done.stderr
    assert f" {sudo}make system\n" in done.stderr
    assert f" {sudo}apt-get install {' '.join(missing)}\n" in done.stderr
    assert root == ("sudo" not in done.stderr)


@pytest.mark.parametrize("asked", [["install"], []])
def test_root_installs_when_asked_and_apt_is_heard(system, asked):
    environment = {} if asked else {"SONICMOE_APT": "1"}
    done = system.run(*asked, root=True, **environment)
    assert done.returncode == 0
    assert system.apt() == ["update", f"install -y {' '.join(system.missing)}"]
    assert done.stdout.count(APT_OUTPUT) == 2
    assert system.run(*asked, root=True, **environment).stderr == ""  # nothing is missing now
    assert len(system.apt()) == 2


@pytest.mark.parametrize("asked", [["install"], []])
def test_nobody_else_does(system, asked):
    environment = {} if asked else {"SONICMOE_APT": "1"}
    done = system.run(*asked, root=False, **environment)
    assert done.returncode == 1
    assert system.apt() == []
    assert "sudo make system" in done.stderr


@pytest.mark.parametrize("value", ["", "0", "yes"])
def test_only_1_is_a_yes(system, value):
    assert system.run(root=True, SONICMOE_APT=value).returncode == 1
    assert system.apt() == []


def test_nothing_missing_is_silent(system):
    system.have(*system.missing)
    done = system.run(root=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ci_installs_unattended():
    assert re.search(r"^export SONICMOE_APT=1\b", (REPOSITORY / ".ci" / "run").read_text(), re.M)
