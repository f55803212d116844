"""`sonicmoe route --logits`: NumPy's files are read, and everything else is refused by name."""

import json
import os
import random
import socket
import struct

import numpy as np
import pytest

ROUTE = ("route", "--top-k", 1, "--tile", 1, "--policy", "down", "--json", "--logits")
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }"
DATA = np.random.default_rng(0).normal(size=(4, 3)).astype("<f4").tobytes()


def npy(header=HEADER, data=DATA, version=(1, 0), length=None):
    """A file with this header; `length` is what it says of the header's length."""
    text = header if isinstance(header, bytes) else header.encode("utf-8")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text + data


@pytest.fixture
def read(sonicmoe, tmp_path):
    """The command on a file of these bytes."""

    def run(content):
        path = tmp_path / "a file.npy"
        path.write_bytes(content)
        return sonicmoe(*ROUTE, path)

    return run


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_logits_from_a_file(sonicmoe, tmp_path, dtype, order):
    logits = np.random.default_rng(0).normal(size=(200, 8)).astype("float32")
    path = tmp_path / "logits.npy"
    np.save(path, np.array(logits, dtype=dtype, order=order))
    arguments = ("route", "--logits", path, "--top-k", 2, "--tile", 16, "--policy", "down")
    (o,) = json.loads(sonicmoe(*arguments, "--json").stdout)["outcomes"]
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    counts = np.bincount(chosen.ravel(), minlength=8)
    assert o["rows_per_expert_before"] == counts.tolist()
    assert o["rows_per_expert_after"] == (counts // 16 * 16).tolist()
    assert "#" in sonicmoe(*arguments).stdout


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_longer_than_one_read(sonicmoe, tmp_path, dtype, order):
    best = np.random.default_rng(1).integers(0, 7, size=30_000)
    logits = np.zeros((30_000, 7), dtype=dtype, order=order)
    logits[np.arange(30_000), best] = 1
    np.save(tmp_path / "long.npy", logits)
    (o,) = json.loads(sonicmoe(*ROUTE, tmp_path / "long.npy").stdout)["outcomes"]
    assert o["rows_per_expert_before"] == np.bincount(best, minlength=7).tolist()


@pytest.mark.parametrize(
    "content",
    [
        npy(),
        npy(version=(2, 0)),
        npy(version=(3, 0)),
        npy(HEADER + " " * 50_000 + "\n"),
        npy(HEADER.replace(" ", " " * 40_000), version=(2, 0)),
        npy('{"shape":(4,3),"descr":"<f4","fortran_order":False}'),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 3L), }"),
    ],
)
def test_every_spelling_of_a_header_is_understood(read, content):
    (o,) = json.loads(read(content).stdout)["outcomes"]
    expected = np.frombuffer(DATA, "<f4").reshape(4, 3).argmax(1)
    assert o["rows_per_expert_before"] == np.bincount(expected, minlength=3).tolist()


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("", "{"),
        ("{}", "descr, fortran_order and shape"),
        ("[1, 2]", "[1, 2]"),
        ("{" * 60_000, "{{{"),
        ("(" * 60_000, "((("),
        (HEADER.replace("'descr'", "'" + "d" * 60_000 + "'"), "once each"),
        (HEADER.replace("'<f4'", "'" + "f" * 60_000 + "'"), "float32 or float64"),
        (HEADER.replace("'<f4'", "'>f4'"), ">f4"),
        (HEADER.replace("'<f4'", "'<f2'"), "<f2"),
        (HEADER.replace("'<f4'", "'|O'"), "|O"),
        (HEADER.replace("'<f4'", "'<f4\x00'"), "float32 or float64"),
        (HEADER.replace("'<f4'", "[('a', '<f4'), ('b', '<f4')]"), "float32 or float64"),
        (HEADER.replace("'<f4'", "<f4"), "float32 or float64"),
        (HEADER.replace("'<f4'", "'<f4"), "float32 or float64"),
        (HEADER.replace("False", "false"), "True or False"),
        (HEADER.replace("False", "0"), "True or False"),
        (HEADER.replace("(4, 3)", "()"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(12,)"), "two dimensions"),
        (HEADER.replace("(4, 3)", "12"), "two dimensions"),
        (HEADER.replace("(4, 3)", "(2, 2, 3)"), "two dimensions"),
        (HEADER.replace("(4, 3)", "((4, 3), )"), "an extent"),
        (HEADER.replace("(4, 3)", "(4, 3"), "two dimensions"),
        (HEADER.replace("(4, 3)", "(4 3)"), "two dimensions"),
        (HEADER.replace("(4, 3)", "(4.0, 3.0)"), "two dimensions"),
        (HEADER.replace("(4, 3)", "(-4, -3)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(0, 3)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(4, 0)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(4, True)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(2147483648, 1)"), "an extent from 1 to 2147483647"),
        (HEADER.replace("(4, 3)", "(18446744073709551620, 3)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(" + "9" * 50_000 + ", 3)"), "an extent from 1"),
        (HEADER.replace("(4, 3)", "(2147483647, 2147483647)"), "4611686014132420609 elements"),
        (HEADER.replace("(4, 3)", "(1073741824, 4)"), "got 48 in all"),
        (HEADER.replace("}", "'shape': (4, 3)}"), "once each"),
        (HEADER.replace("}", "'extra': 1}"), "once each"),
        (HEADER.replace(", }", ""), '"}"'),
        (HEADER + "; import os", "nothing after"),
        (HEADER + HEADER, "nothing after"),
        (HEADER.replace("'shape'", "'\u00e9'"), "once each"),
        (b"\xff" * 64, "{"),
        (b"\0" * 64, "{"),
    ],
)
def test_a_malformed_header_is_refused(read, refused, header, named):
    line = refused(read(npy(header)), "a file.npy", "expected", named)
    assert len(line) < 500


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "truncated"),
        (b"these are no logits at all", "other first bytes"),
        (b"PK\x03\x04" + b"\0" * 100, "other first bytes"),
        (npy(version=(0, 0)), "got 0.0"),
        (npy(version=(1, 1)), "got 1.1"),
        (npy(version=(4, 0)), "got 4.0"),
        (npy(version=(255, 255)), "got 255.255"),
        (npy(length=0xFFFF), "truncated"),
        (npy(length=0), "{"),
        (npy(version=(2, 0), length=0xFFFFFFFF), "header of at most 1048576 bytes"),
        (npy(version=(2, 0), length=1 << 20), "truncated"),
        (npy(HEADER + " " * (1 << 20), version=(2, 0)), "header of at most 1048576 bytes"),
        (npy(data=DATA + b"\0"), "got 49 in all"),
        (npy() + npy(), "in all"),
        (npy(data=b""), "got 0 in all"),
    ],
)
def test_a_file_of_another_length_or_format_is_refused(read, refused, content, named):
    refused(read(content), "a file.npy", named)


def test_every_prefix_of_a_file_is_refused(read, refused):
    for length in range(len(npy())):
        refused(read(npy()[:length]), "a file.npy")


def test_damaged_files_never_end_the_process(read):
    generator = random.Random(0)
    for _ in range(150):
        content = bytearray(npy())
        for _ in range(generator.choice((1, 1, 2, 8))):
            content[generator.randrange(len(content))] = generator.choice((0, 39, 44, 57, 255))
        result = read(bytes(content))
        assert result.returncode in (0, 2), content
        assert len(result.stderr.splitlines()) == result.returncode // 2, content


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, -1e300])
@pytest.mark.parametrize("order", ["C", "F"])
def test_logits_that_float32_does_not_hold_are_refused(read, refused, value, order):
    logits = np.zeros((5, 3), order=order)
    logits[3, 1] = value
    header = f"{{'descr': '<f8', 'fortran_order': {order == 'F'}, 'shape': (5, 3), }}"
    line = refused(read(npy(header, logits.tobytes(order="A"))), "a file.npy", "finite")
    assert "[3, 1]" in line


def test_what_is_no_regular_file_is_refused_at_once(sonicmoe, refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, named in (
            (tmp_path / "pipe", "a pipe"),
            (tmp_path / "folder", "a folder"),
            (tmp_path / "socket", "a socket"),
            (tmp_path / "dangling", "no such file"),
            (tmp_path / "missing.npy", "no such file"),
            (tmp_path / "loop", "symbolic links"),
            (tmp_path / "folder" / "x" / "y", "no such file"),
            (tmp_path / ("n" * 300), "too long"),
            ("/dev/zero", "a device"),
            ("/dev/null", "a device"),
            ("/dev/stdin", ""),
            (".", "a folder"),
        ):
            refused(sonicmoe(*ROUTE, path), f'--logits: cannot read "{path}"', named)


def test_a_file_without_permission_is_refused(sonicmoe, refused, tmp_path):
    path = tmp_path / "secret.npy"
    path.write_bytes(npy())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    refused(sonicmoe(*ROUTE, path), "secret.npy", "Permission denied")


def test_a_file_larger_than_the_memory_is_refused(sonicmoe, refused, tmp_path):
    path = tmp_path / "sparse.npy"
    header = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2147483647, 512), }", b"")
    path.write_bytes(header)
    try:
        os.truncate(path, len(header) + 4 * 2147483647 * 512)
    except OSError:
        pytest.skip("no file of 4 TiB here")
    refused(sonicmoe(*ROUTE, path), "sparse.npy", "fits the memory")


def test_links_and_odd_names_are_read(sonicmoe, tmp_path):
    for name in ("line\nbreak", "quote\"'", "$HOME", "-", b"\xff\xfe", "é"):
        path = os.path.join(
            os.fsencode(tmp_path), name if isinstance(name, bytes) else name.encode()
        )
        with open(path, "wb") as file:
            file.write(npy())
        result = sonicmoe(*ROUTE[:-2], "--logits", path)
        assert result.returncode == 0, result.stderr
    (tmp_path / "link").symlink_to("é")
    assert sonicmoe(*ROUTE, tmp_path / "link").returncode == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--tokens", 4, "--experts", 3), None),
        (("--tokens", 5), "--tokens: expected 4 as in"),
        (("--experts", 4), "--experts: expected 3 as in"),
        (("--skew", 1), "--skew: expected none beside --logits"),
        (("--top-k", 4), "--top-k: expected 1 to the number of experts (3)"),
        (("--tile", "1,5"), "--tile: expected 1 to the number of tokens (4)"),
    ],
)
def test_options_and_file_have_to_agree(sonicmoe, refused, tmp_path, options, named):
    path = tmp_path / "logits.npy"
    path.write_bytes(npy())
    for option, value in (("--top-k", 1), ("--tile", 1)):
        options += () if option in options else (option, value)
    result = sonicmoe("route", "--logits", path, *options)
    if named:
        refused(result, named)
    else:
        assert result.returncode == 0, result.stderr
