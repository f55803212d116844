"""Text tokenised to a file: prepare writes it, the trainer reads it, damage is named."""

import json
import tarfile

import numpy as np
import pytest

from trainer import data, prepare, tokenfile
from trainer.metrics import read_metrics
from trainer.schema import UserError
from trainer.train import main


@pytest.fixture
def tokens(text_folder, tmp_path):
    path = tmp_path / "tokens.bin"
    argv = [str(text_folder), "--output", str(path), "--vocab-size", "300", "--suffixes", ".txt"]
    assert prepare.main(argv) == 0
    return path


def change_header(path, **fields):
    place = tokenfile.header_path(path)
    place.write_text(json.dumps({**json.loads(place.read_text()), **fields}))


def test_the_tokens_are_the_text(tokens, text_folder):
    loaded = data.load_tokens(str(tokens))
    assert loaded.train.dtype == np.uint16 and isinstance(loaded.train, np.memmap)
    whole = loaded.tokenizer.decode(np.concatenate([loaded.train, loaded.validation]))
    texts = set(whole.split(data.END_OF_TEXT)) - {""}
    assert texts == {path.read_text() for path in text_folder.iterdir()}
    assert loaded.validation_names == data.load_corpus(str(text_folder)).validation_names


def test_an_archive_gives_the_same_file_as_its_folder(tokens, text_folder, tmp_path):
    with tarfile.open(tmp_path / "text.tar.xz", "w:xz") as archive:
        for path in text_folder.iterdir():
            archive.add(path, path.name)
    other = tmp_path / "other.bin"
    argv = ["--output", str(other), "--vocab-size", "300", "--suffixes", ".txt"]
    assert prepare.main([str(tmp_path / "text.tar.xz"), *argv]) == 0
    assert other.read_bytes() == tokens.read_bytes()


def test_no_more_text_than_asked_for(text_folder, tmp_path, capsys):
    argv = ["--output", str(tmp_path / "few.bin"), "--vocab-size", "300", "--suffixes", ""]
    assert prepare.main([str(text_folder), *argv, "--max-mib", "0.01"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 2 <= figures["files"] < 12
    tokens = figures["train_tokens"] + figures["validation_tokens"]
    assert (tmp_path / "few.bin").stat().st_size == 2 * tokens


def test_training_on_a_file_of_tokens(tokens, flags, run_dir):
    assert main(flags(data=tokens)) == 0
    losses = [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert (
        main(["--resume", "--name", "run", "--runs-dir", str(run_dir.parent), "--steps", "8"]) == 0
    )


def test_a_wide_vocabulary_takes_four_bytes(tmp_path):
    assert (
        tokenfile.dtype_for(1 << 16) == "uint16" and tokenfile.dtype_for(1 + (1 << 16)) == "uint32"
    )
    path = tmp_path / "wide.bin"
    with path.open("wb") as file:
        pieces = [np.array([1, 70_000]), np.array([2])]
        digest = tokenfile.write_tokens(file, pieces, "uint32")
    with tokenfile.header_path(path).open("wb") as file:
        header = tokenfile.Header("uint32", 70_001, 2, 1, 9, digest, "x", [], {})
        tokenfile.write_header(file, header)
    file = tokenfile.read(path)
    assert file.train.tolist() == [1, 70_000] and file.validation.tolist() == [2]


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), ["No such file"]),
        (lambda path: tokenfile.header_path(path).unlink(), ["cannot read", "tokens.json"]),
        (lambda path: tokenfile.header_path(path).write_text("{]"), ["cannot read", "tokens.json"]),
        (lambda path: tokenfile.header_path(path).write_text("[]"), ["expected an object"]),
        (lambda path: change_header(path, format="other"), ["format: expected", "'other'"]),
        (lambda path: change_header(path, dtype="int8"), ["dtype: expected", "'int8'"]),
        (lambda path: change_header(path, vocab_size=40), ["outside the vocabulary of 40"]),
        (lambda path: change_header(path, vocab_size=301), ["tokenizer has", "301"]),
        (lambda path: change_header(path, tokenizer={}), ["tokenizer"]),
        (cut, ["bytes", "says"]),
        (flip, ["SHA-256"]),
    ],
)
def test_a_bad_file_is_named(tokens, flags, capsys, damage, words):
    damage(tokens)
    with pytest.raises(UserError):
        data.load_tokens(str(tokens))
    capsys.readouterr()
    assert main(flags(data=tokens)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data" in error
    for word in words:
        assert word in error


def test_a_source_without_text_is_refused(tmp_path, capsys):
    for source in (tmp_path, tmp_path / "absent"):
        assert prepare.main([str(source), "--output", str(tmp_path / "x.bin")]) == 2
        assert "error:" in capsys.readouterr().err
