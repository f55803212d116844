"""Commands that the pages show: whether their programs, files, targets and flags exist.

Nothing of what they do is done.
"""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
FREE = {  # programs of the system, with whatever arguments
    *("apt-get", "cd", "dpkg", "export", "git", "source", "sudo", "uv", "mkdir", "sha256sum"),
    *("ctest", "nvidia-smi", "perf", "top", "taskset", "numactl", "nice"),
}
SEPARATORS = {"&&", "||", ";", "|", "&"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments and what is set for it alone."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                command.append(word)
                continue
            while command and re.match(r"\w+=", command[0]):
                command.pop(0)
            if command:
                yield command
            command = []


def flags_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def unknown_flags(words: list[str], help_text: str) -> list[str]:
    known = set(re.findall(r"--[\w-]+", help_text)) | {"--help"}
    return [f"no flag {flag}" for flag in flags_of(words) if flag not in known]


@functools.cache
def python_help(program: str) -> str:
    """What a module or a file of ours prints for --help, run in this process."""
    out = io.StringIO()
    path = program if program.endswith(".py") else None
    with (
        mock.patch.object(sys, "argv", [program, "--help"]),
        mock.patch.object(sys, "path", [str(REPOSITORY), *sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        if path:
            runpy.run_path(str(REPOSITORY / path), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=False)
    return out.getvalue()


def check_module(module: str, arguments: list[str]) -> list[str]:
    if module == "pip":
        return check_pip(arguments)
    if not (REPOSITORY / module.split(".")[0]).is_dir():
        return [] if find_spec(module.split(".")[0]) else [f"no module {module}"]
    if not (REPOSITORY / (module.replace(".", "/") + ".py")).is_file():
        return [f"no module {module}"]
    return unknown_flags(arguments, python_help(module))


def check_python(arguments: list[str]) -> list[str]:
    while arguments and arguments[0] in ("-u", "-X", "dev"):
        arguments = arguments[1:]
    if arguments[:1] == ["-m"]:
        return check_module(arguments[1], arguments[2:])
    if not arguments or arguments[0] == "-c":
        return []
    file, *rest = arguments
    if not (REPOSITORY / file).is_file():
        return [f"no file {file}"]
    return unknown_flags(rest, python_help(file))


def check_torchrun(arguments: list[str]) -> list[str]:
    files = [word for word in arguments if word.endswith(".py")]
    return [f"no file {file}" for file in files if not (REPOSITORY / file).is_file()]


def check_pip(arguments: list[str]) -> list[str]:
    """Paths exist, but those of what a build writes."""
    paths = [word.split("[")[0] for word in arguments if word.startswith(".")]
    return [f"no folder {path}" for path in paths if not (REPOSITORY / path).exists()]


def recipe(target: str) -> str | None:
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    return found and found[1]


def check_make(arguments: list[str]) -> list[str]:
    problems = []
    targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
    variables = dict(word.split("=", 1) for word in arguments if re.match(r"\w+=", word))
    problems += [f"no target {target}" for target in targets if recipe(target) is None]
    problems += [
        f"no variable {name}" for name in variables if not re.search(rf"\b{name}\b", MAKEFILE)
    ]
    module = re.search(r"-m ([\w.]+)", recipe(targets[0]) or "") if targets else None
    if "ARGS" in variables and module:
        problems += check_module(module[1], shlex.split(variables["ARGS"]))
    return problems


def check_cmake(arguments: list[str]) -> list[str]:
    text = "".join(
        path.read_text()
        for path in [REPOSITORY / "CMakeLists.txt", *REPOSITORY.glob("*/CMakeLists.txt")]
    )
    options = re.findall(r"-D(SONICMOE_\w+)", " ".join(arguments))
    problems = [f"no option {option}" for option in options if option not in text]
    if "--preset" in arguments:
        presets = json.loads((REPOSITORY / "CMakePresets.json").read_text())
        known = {p["name"] for kind in ("configure", "build") for p in presets[f"{kind}Presets"]}
        name = arguments[arguments.index("--preset") + 1]
        problems += [] if name in known else [f"no preset {name}"]
    return problems


@functools.cache
def command_help(*subcommand: str) -> str:
    program = os.environ.get("SONICMOE_CLI", REPOSITORY / "build" / "cli" / "sonicmoe")
    done = subprocess.run([program, *subcommand, "--help"], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def check_sonicmoe(arguments: list[str]) -> list[str]:
    subcommand = [word for word in arguments[:1] if not word.startswith("-")]
    text = command_help(*subcommand)
    return unknown_flags(arguments, text) if text else [f"no subcommand {subcommand}"]


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
    "cmake": check_cmake,
    "sonicmoe": check_sonicmoe,
}


def problems_of(text: str) -> list[str]:
    """One line for everything in the commands that does not exist."""
    problems = []
    for program, *arguments in commands(text):
        name = Path(program).name
        if name in FREE:
            continue
        found = CHECKS[name](arguments) if name in CHECKS else ["a program that no check knows"]
        problems += [f"{shlex.join([program, *arguments])}: {problem}" for problem in found]
    return problems
