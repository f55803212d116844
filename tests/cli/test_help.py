"""What leads a newcomer on: help, examples, colors, completion, the manual, what `info` reports."""

import json
import os
import pty
import re
import shutil
import subprocess

import pytest

COMMANDS = ("info", "check", "bench", "memory", "route", "completion", "man")
SHELLS = ("bash", "fish", "zsh")
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def examples_of(text: str) -> list[str]:
    """The lines below "Examples:"."""
    return [line.strip() for line in text.partition("\nExamples:\n")[2].splitlines() if line]


def on_a_terminal(command: str, *arguments: str, **environment: str) -> str:
    """What the command writes, stdout and stderr together, where both are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [command, *arguments],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment},
    )
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 1 << 16):
            written += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(leader)
    process.wait(timeout=60)
    return written.decode().replace("\r\n", "\n")


def test_the_bare_command_shows_its_help(sonicmoe):
    bare, helped = sonicmoe(), sonicmoe("--help")
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr == helped.stdout and all(name in bare.stderr for name in COMMANDS)


def test_the_version_has_a_short_flag(sonicmoe):
    short, long = sonicmoe("-V"), sonicmoe("--version")
    assert (short.returncode, short.stdout) == (0, long.stdout)
    assert re.fullmatch(r"sonicmoe \d+\.\d+\.\d+\n", short.stdout)


@pytest.mark.parametrize("name", ("", *COMMANDS))
def test_every_help_has_examples_that_run(command, sonicmoe, tmp_path, name):
    np = pytest.importorskip("numpy")
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).normal(size=(256, 8)))
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    lines = examples_of(sonicmoe(*filter(None, [name]), "--help").stdout)
    assert lines and all("sonicmoe" in line for line in lines)
    environment = {
        **os.environ,
        "PATH": f"{os.path.dirname(command)}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    (tmp_path / ".zfunc").mkdir()
    (tmp_path / ".config/fish/completions").mkdir(parents=True)
    for line in lines:
        if line in ("sonicmoe bench", "sonicmoe check") or re.search("--device cuda|[|] man", line):
            continue  # longer than a test, for a GPU, or for who has manuals installed
        shell = ["bash", "-c", f"set -o pipefail; {line}"]
        result = subprocess.run(
            shell, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, f"{line}: {result.stderr}"


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (("--frob", "info"), 'unknown option "--frob" before "info"'),
        (("info", "--frob=3"), 'info: unknown option "--frob=3"'),
        (("info", "-abc"), 'info: unknown option "-abc"'),
        (("memory", "--shap", "1,2,3,4,5"), 'memory: unknown option "--shap"'),
    ],
)
def test_an_unknown_option_is_named_as_it_was_typed(sonicmoe, refused, arguments, typed):
    refused(sonicmoe(*arguments), typed, "--help")


# ---------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("arguments", [("--help",), ("info",), ("frob",)])
def test_colors_are_for_terminals_alone(command, sonicmoe, arguments):
    coloured = on_a_terminal(command, *arguments)
    assert "\x1b[" in coloured
    piped = sonicmoe(*arguments)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == piped.stdout + piped.stderr
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal(command, *arguments, **plain) == piped.stdout + piped.stderr


# ------------------------------------------------------------------------------------ completion


def candidates(sonicmoe, *words: str) -> list[str]:
    result = sonicmoe("complete", *words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()


def test_candidates_are_what_help_lists(sonicmoe):
    assert candidates(sonicmoe, "") == [*COMMANDS, "--help", "--version"]
    assert candidates(sonicmoe, "m") == ["memory", "man"]
    for name in COMMANDS:
        listed = re.findall(r"^  (?:-.,)?(--[a-z-]+)", sonicmoe(name, "--help").stdout, re.M)
        assert candidates(sonicmoe, name, "--") == listed != []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("memory", "--gpu", "h"), ["h100", "h100-80gb", "h200"]),
        (("memory", "--gpu", "=", "b2"), ["b200"]),
        (("memory", "--gpu", "="), None),
        (("memory", "--json", "--act"), ["--activation"]),
        (("bench", "--dtype", ""), ["float32", "bfloat16", "both"]),
        (("route", "--policy", "bal"), ["balanced"]),
        (("completion", "z"), ["zsh"]),
        (("memory", "--layers", ""), []),
        (("frob", "--gpu", "h"), []),
        (("memory", "--help-me"), []),
    ],
)
def test_values_are_completed(sonicmoe, words, expected):
    found = candidates(sonicmoe, *words)
    assert found == expected if expected is not None else "l40s" in found


def test_bash_completes(command):
    script = subprocess.run(
        [command, "completion", "bash"], capture_output=True, text=True, check=True
    ).stdout
    ask = f'{script}\nCOMP_WORDS=({command} memory --gpu h2); COMP_CWORD=3; _sonicmoe "{command}"'
    ask += '\nprintf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["h200"]


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_have_no_syntax_error(sonicmoe, shell):
    script = sonicmoe("completion", shell).stdout
    assert "sonicmoe" in script and "complete" in script
    if shutil.which(shell):
        check = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert (check.returncode, check.stderr) == (0, "")


# ---------------------------------------------------------------------------------------- manual


def test_the_manual_says_what_help_says(sonicmoe):
    if not shutil.which("man") or not shutil.which("groff"):
        pytest.skip("no man here")
    shown = subprocess.run(
        ["man", "--warnings", "-l", "-"],
        input=sonicmoe("man").stdout,
        env={**os.environ, "MANWIDTH": "200", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stderr == ""
    text = " ".join(re.sub(r".\x08", "", shown.stdout).split())
    for name in COMMANDS:
        helped = sonicmoe(name, "--help").stdout
        assert helped.splitlines()[0] in text
        options = re.findall(r"^  (?:-.,)?(--[a-z-]+)", helped, re.M)
        assert all(option in text for option in [*options, *examples_of(helped)])


# ------------------------------------------------------------------------------------------ info


def test_info_describes_the_build(sonicmoe):
    text = sonicmoe("info").stdout
    for name in ("commit", "build type", "compiler", "CUDA architectures", "OpenMP runtime"):
        assert re.search(rf"^{name}  +\S", text, re.M), name
    threads = re.search(r"^threads +(\d+)$", sonicmoe("info", OMP_NUM_THREADS="3").stdout, re.M)
    assert threads and (threads[1] == "3" or "none" in text)
