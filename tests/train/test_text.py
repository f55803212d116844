"""Text of others: what is no file or no UTF-8 is left out or named; nothing of others is
replaced."""

import bz2
import gzip
import json
import lzma
import os
import socket
import tarfile

import pytest
from conftest import contents

from trainer import data, files, prepare, tokenfile
from trainer.program import printable
from trainer.schema import UserError
from trainer.train import main

LATIN = os.fsdecode(b"caf\xe9.txt")
ODD_NAMES = [LATIN, os.fsdecode(b"\xff\xfe.txt"), "new\nline.txt", "escape\x1b[31m.txt", "ü.txt"]


def add_what_is_no_text(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "round").symlink_to(".")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (folder / "binary.txt").write_bytes(b"a\0b")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(os.path.relpath(folder / "socket.txt"))


def test_what_is_no_text_is_left_out(text_folder):
    before = data.load_corpus(str(text_folder))
    add_what_is_no_text(text_folder)
    assert data.load_corpus(str(text_folder)) == before


@pytest.mark.parametrize("name", ["pipe.txt", "loop.txt", "zero.txt", "broken.txt", "socket.txt"])
@pytest.mark.parametrize("program", ["train", "prepare"])
def test_alone_it_is_refused(refuse, flags, text_folder, tmp_path, program, name):
    add_what_is_no_text(text_folder)
    place = text_folder / name
    if program == "train":
        refuse(flags(data=place), f"--data {place}")
    else:
        refuse([place, "--output", tmp_path / "t.bin"], str(place), entry=prepare.main)
    assert os.listdir(tmp_path) == ["text"]


def test_names_that_are_no_utf8(flags, text_folder, tmp_path, capsys, monkeypatch):
    for name in ODD_NAMES:
        (text_folder / name).write_text((text_folder / "file0.txt").read_text())
    monkeypatch.setattr(data, "VALIDATION_SHARE", 0.9)  # they are among the held-out ones
    corpus = data.load_corpus(str(text_folder))
    assert set(map(printable, ODD_NAMES)) <= set(corpus.validation_names)
    assert len(corpus.train) + len(corpus.validation) == 12 + len(ODD_NAMES)
    argv = ["--output", str(tmp_path / "t.bin"), "--vocab-size", "300", "--suffixes", ".txt"]
    assert prepare.main([str(text_folder), *argv]) == 0
    assert data.load_tokens(str(tmp_path / "t.bin")).validation_names == corpus.validation_names
    for place in (text_folder, text_folder / LATIN, tmp_path / "t.bin"):
        assert main(flags("--overwrite", data=place, steps=1)) == 0
    printed = capsys.readouterr()
    assert "\x1b[31m" not in printed.out and "caf\\udce9.txt" in printed.out


def test_the_place_of_a_text_may_be_no_utf8(flags, text_folder, tmp_path):
    place = tmp_path / os.fsdecode(b"texte-fran\xe7ais")
    text_folder.rename(place)
    argv = ["--resume", "--name", "run", "--runs-dir", str(tmp_path / "runs"), "--steps", "2"]
    assert main(flags(data=place, steps=1)) == 0 and main(argv) == 0


def test_too_much_text_is_refused_before_it_is_read(monkeypatch, text_folder, tmp_path):
    with open(tmp_path / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="More than 1024 MiB"):
        data.load_corpus(str(tmp_path / "sparse.txt"))
    monkeypatch.setattr(data, "MOST_TEXT", 10_000)
    with pytest.raises(UserError, match="trainer.prepare"):
        data.load_corpus(str(text_folder))


# ------------------------------------------------------------------------------------------ prepare


@pytest.fixture
def prepared(text_folder, tmp_path):
    """A command line of prepare, without its source and its output."""
    return ["--vocab-size", "300", "--suffixes", ".txt"]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("t.json", lambda path: path.write_text('{"mine": 1}')),
        ("t.json", lambda path: path.write_text("mine")),
        ("t.json", os.mkdir),
        ("t.json", os.mkfifo),
        ("t.json", lambda path: path.symlink_to("nowhere")),
        ("t.bin", lambda path: path.write_bytes(b"firmware")),
        ("t.bin", os.mkdir),
        ("t.bin", os.mkfifo),
    ],
)
def test_files_of_others_are_not_replaced(refuse, text_folder, tmp_path, prepared, name, make):
    make(tmp_path / name)
    before = contents(tmp_path)
    argv = [text_folder, "--output", tmp_path / "t.bin", *prepared]
    refuse(argv, str(tmp_path / name), "would be replaced", entry=prepare.main)
    assert contents(tmp_path) == before


def test_files_of_its_own_are_replaced(text_folder, tmp_path, prepared):
    argv = [str(text_folder), "--output", str(tmp_path / "t.bin"), *prepared]
    assert prepare.main(argv) == 0
    (tmp_path / "t.bin").unlink()  # as a kill leaves it between the two renames
    (text_folder / "more.txt").write_text("another text\n" * 100)
    assert prepare.main(argv) == 0 and prepare.main(argv) == 0
    assert data.load_tokens(str(tmp_path / "t.bin")).train.size > 0
    assert sorted(os.listdir(tmp_path)) == ["t.bin", "t.json", "text"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "t.dat"], "NAME.bin"),
        (["--output", "/proc/t.bin"], "cannot be written"),
        (["--output", "/dev/null/t.bin"], "cannot be written"),
        (["--output", "t" * 300 + ".bin"], "too long"),
        (["--vocab-size", "256"], "--vocab-size"),
        (["--vocab-size", str(10**9)], "--vocab-size"),
        (["--max-mib", "nan"], "--max-mib"),
        (["--tokenizer-mib", "0"], "--tokenizer-mib"),
        (["--max-file-kib", "-1"], "--max-file-kib"),
        (["--suffixes", os.fsdecode(b"\xff")], "--suffixes"),
        (["--max-mib", "0.001"], "fewer than two files"),
    ],
)
def test_wrong_flags_of_prepare(refuse, text_folder, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    argv = [text_folder, "--output", "t.bin", "--suffixes", ".txt", *flags]
    refuse(argv, words, entry=prepare.main)
    assert os.listdir(tmp_path) == ["text"]


@pytest.fixture
def archive(text_folder, tmp_path):
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        for path in sorted(text_folder.iterdir()):
            tar.add(path, path.name)
    return (tmp_path / "text.tar").read_bytes()


PACKED = {"tar": bytes, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("damage", ["cut", "head", "flipped", "empty"])
def test_a_damaged_archive_is_named(refuse, archive, tmp_path, prepared, packing, damage):
    content = bytearray(PACKED[packing](archive))
    if damage == "flipped":  # an archive that is not packed has sums of its headers alone
        content[5 if packing == "tar" else len(content) // 2] ^= 0x10
    kept = {"cut": len(content) // 2, "head": 100, "flipped": len(content), "empty": 0}[damage]
    place = tmp_path / "damaged.tar"
    place.write_bytes(content[:kept])
    refuse([place, "--output", tmp_path / "t.bin", *prepared], str(place), entry=prepare.main)
    assert sorted(os.listdir(tmp_path)) == ["damaged.tar", "text", "text.tar"]


@pytest.mark.parametrize("packing", PACKED)
def test_a_whole_archive_is_read(archive, tmp_path, prepared, packing):
    (tmp_path / "text.tar").write_bytes(PACKED[packing](archive))
    argv = [str(tmp_path / "text.tar"), "--output", str(tmp_path / "t.bin"), *prepared]
    assert prepare.main(argv) == 0


@pytest.mark.parametrize("limit", [0.004, 0.01, 0.02])
def test_a_large_source_is_not_held_as_a_whole(text_folder, prepared, monkeypatch, limit):
    """Dropping what is too much while reading gives the documents that are chosen at the end."""
    argv = [str(text_folder), "--output", "t.bin", *prepared, "--max-mib"]
    chosen = prepare.read_documents(prepare.parse([*argv, str(limit)]))
    everything = prepare.read_documents(prepare.parse([*argv, "400"]))
    expected = prepare._first(everything, limit)
    assert list(chosen.items()) == list(expected.items()) and 2 <= len(chosen) < 12


@pytest.mark.parametrize("field", tokenfile.RULES)
def test_every_field_of_a_header_is_checked(refuse, flags, text_folder, tmp_path, prepared, field):
    path = tmp_path / "t.bin"
    assert prepare.main([str(text_folder), "--output", str(path), *prepared]) == 0
    place = tokenfile.header_path(path)
    fields = files.parse_json(place.read_bytes())
    rule, refused = tokenfile.RULES[field], 0
    for value in (None, -1, True, 2.5, [], {}, [3], "", "other", 2**70):
        if rule.accepts(value):
            continue
        place.write_text(json.dumps({**fields, field: value}))
        with pytest.raises(UserError, match=f"{field}: expected"):
            data.load_tokens(str(path))
        refused += 1
    assert refused >= 5
    del fields[field]
    place.write_text(json.dumps(fields))
    refuse(flags(data=path), f"{field} is missing")


def test_a_header_that_moves_the_border_is_noticed_on_resume(refuse, flags, text_folder, tmp_path):
    path = tmp_path / "t.bin"
    argv = [str(text_folder), "--output", str(path), "--vocab-size", "300", "--suffixes", ".txt"]
    assert prepare.main(argv) == 0 and main(flags(data=path, steps=1)) == 0
    place = tokenfile.header_path(path)
    fields = files.parse_json(place.read_bytes())
    fields["train_tokens"] += 100
    fields["validation_tokens"] -= 100
    place.write_text(json.dumps(fields))
    resume = ["--resume", "--name", "run", "--runs-dir", tmp_path / "runs", "--steps", "2"]
    refuse(resume, "has changed")
