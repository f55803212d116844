"""Output that cannot be written, memory and threads that cannot be had: one line on stderr and a
status other than 0."""

import json
import os
import resource
import subprocess
import tempfile

import numpy as np
import pytest

COMMANDS = (
    ("--help",),
    ("--version",),
    ("route", "--help"),
    ("info",),
    ("info", "--json"),
    ("memory",),
    ("memory", "--json"),
    ("check", "--op", "moe", "--cases", 1),
    ("check", "--op", "route", "--cases", 1, "--json"),
    ("bench", "--shape", "8,8,8,2,1", "--repeats", 1, "--json"),
    ("route", "--tokens", 256),
    ("route", "--tokens", 64, "--experts", 20_000, "--tile", 32, "--json"),  # more than any buffer
)


@pytest.fixture(scope="module")
def run(command):
    def start(arguments, setup=None, **streams):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        words = [command, *map(str, arguments)]
        return subprocess.run(words, **streams, text=True, timeout=120, preexec_fn=setup)

    return start


def assert_one_line(result, *words):
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("sonicmoe: ") and len(result.stderr.splitlines()) == 1
    assert any(word in result.stderr for word in words), result.stderr


# --------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("arguments", COMMANDS)
def test_output_that_nobody_takes_is_an_error(run, tmp_path, arguments):
    with open("/dev/full", "w") as full:
        assert_one_line(run(arguments, stdout=full), "cannot write the output")
    assert_one_line(
        run(arguments, stdout=None, setup=lambda: os.close(1)), "cannot write the output"
    )
    with open("/dev/null") as read_only:
        assert_one_line(run(arguments, stdout=read_only), "cannot write the output")
    reader, writer = os.pipe()
    os.close(reader)
    assert_one_line(run(arguments, stdout=writer), "cannot write the output")
    os.close(writer)


def test_a_file_that_may_not_grow_is_an_error(run, tmp_path):
    with open(tmp_path / "out", "w") as file:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
        assert_one_line(run(("memory", "--json"), stdout=file, setup=limit), "File too large")


def test_a_reader_that_leaves_in_the_middle_is_an_error(command):
    arguments = ("route", "--tokens", "64", "--experts", "200000", "--tile", "32", "--json")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout.read(1) == b"{"
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        errors.seek(0)
        assert "cannot write the output" in errors.read()


def test_a_refusal_stays_a_refusal_without_output(run):
    for setup in (lambda: os.close(1), lambda: os.close(0), lambda: os.closerange(0, 2)):
        result = run(("route", "--tokens", "many"), setup=setup, stdout=None, stdin=None)
        assert result.returncode == 2 and "--tokens" in result.stderr


def test_messages_that_nobody_takes_change_no_status(run):
    with open("/dev/full", "w") as full:
        assert run(("info",), stderr=full).returncode == 0
        assert run(("frobnicate",), stderr=full).returncode == 2
    assert run(("frobnicate",), stderr=None, setup=lambda: os.close(2)).returncode == 2


def test_a_file_that_is_read_is_not_written_to(run, tmp_path):
    path = tmp_path / "logits.npy"  # opened as the first free number, that of a closed stdout
    np.save(path, np.zeros((4, 2), dtype="float32"))
    before = path.read_bytes()
    arguments = ("route", "--logits", path, "--top-k", 1, "--tile", 1)
    assert_one_line(run(arguments, stdout=None, setup=lambda: os.close(1)), "cannot write")
    assert path.read_bytes() == before


# --------------------------------------------------------------------------- memory and threads


@pytest.fixture(scope="module")
def within(run):
    """The command within so many MiB of address space."""

    def start(mebibytes, arguments):
        limit = (mebibytes << 20, mebibytes << 20)
        return run(arguments, setup=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))

    if start(400, ("info",)).returncode != 0:
        pytest.skip("the command does not start in 400 MiB (a sanitizer's build)")
    return start


@pytest.mark.parametrize(
    "arguments",
    [
        ("route", "--tokens", 2_000_000, "--experts", 128),
        ("route", "--tokens", 262_144, "--experts", 256, "--policy", "up"),
        ("bench", "--shape", "65536,4096,4096,64,8", "--no-check"),
        ("bench", "--shape", "16384,1024,256,8,2", "--repeats", 1),
        ("bench", "--suite", "models", "--json"),
    ],
)
def test_work_that_does_not_fit_the_memory_is_an_error(within, arguments):
    result = within(400, (*arguments, "--threads", 1))
    assert result.returncode in (1, 2)
    assert result.stderr.startswith("sonicmoe: ") and len(result.stderr.splitlines()) == 1
    assert "memory" in result.stderr or "this process may use" in result.stderr


def test_no_limit_of_memory_ends_the_process(within):
    statuses = set()
    for mebibytes in range(60, 400, 40):
        result = within(mebibytes, ("check", "--cases", 1, "--threads", 2))
        if result.returncode == 127:  # the system's loader gave up
            continue
        statuses.add(result.returncode)
        if result.returncode:
            assert_one_line(result, "memory", "threads")
    assert statuses == {0, 1}


def test_logits_larger_than_the_limit_are_refused(within, tmp_path):
    path = tmp_path / "large.npy"
    np.lib.format.open_memmap(path, "w+", dtype="float32", shape=(1_000_000, 100)).flush()
    result = within(400, ("route", "--logits", path, "--threads", 1))
    assert result.returncode == 2 and "large.npy" in result.stderr
    assert "memory" in result.stderr and len(result.stderr.splitlines()) == 1


def test_threads_that_cannot_be_had_are_an_error(within):
    result = within(400, ("check", "--op", "moe", "--cases", 1, "--threads", 512))
    assert_one_line(result, "cannot start 512 threads, only")


def test_a_suite_times_what_fits(within):
    bench = ("bench", "--suite", "cpu", "--dtype", "bfloat16", "--tokens", 64, "--repeats", 1)
    result = within(400, (*bench, "--seconds", 0, "--no-check", "--threads", 1, "--json"))
    assert (result.returncode, result.stderr) == (0, "")
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows["small"]["forward"]["samples"] == 1
    assert "memory" in rows["fine"]["skipped"] and "memory" in rows["coarse"]["skipped"]
