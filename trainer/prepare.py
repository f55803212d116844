"""Entry point: python -m trainer.prepare SOURCE --output NAME.bin: text to tokens.

SOURCE is a folder or a tar archive (compressed or not) of text, for example the sources that a
Debian package brings. Files are taken in an order that their names' hashes give, up to --max-mib of
text, so every part of a large source is there in proportion. The tokenizer is trained on the first
of the training files, --tokenizer-mib of them. Prints what was measured as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import data, files, program, schema, tokenfile
from .config import MOST_VOCABULARY
from .schema import UserError
from .signals import Signals

MIB = 1 << 20
SUFFIXES = ".c .h .S .py .rst .txt .md .html .cc .cpp .rs .dts .dtsi .sh .pl Makefile Kconfig"
BATCH = 1024  # documents tokenised at a time


def parse(argv: list[str]) -> argparse.Namespace:
    parser = schema.Parser("prepare", __doc__.splitlines()[0])
    parser.add("source", schema.path(), "a folder or a tar archive")
    parser.add("--output", schema.path(), "the file of tokens", required=True, metavar="NAME.bin")
    vocabulary = schema.whole(257, MOST_VOCABULARY)
    parser.add("--vocab-size", vocabulary, "tokens of it", default=16384, metavar="N")
    for flag, default, help_text in (
        ("--max-mib", 400.0, "text taken"),
        ("--tokenizer-mib", 48.0, "text the tokenizer is trained on"),
        ("--max-file-kib", 256.0, "larger files, mostly generated tables, are left out"),
    ):
        parser.add(flag, schema.number(above=True), help_text, default=default, metavar="X")
    suffixes = "endings of the names taken, separated by blanks; '' takes all"
    parser.add("--suffixes", schema.text(), suffixes, default=SUFFIXES)
    skip = "leave out files whose name holds TEXT; may be repeated"
    parser.add("--skip", schema.text(), skip, default=[], action="append", metavar="TEXT")
    arguments = parser.parse_args(argv)
    arguments.source, arguments.output = Path(arguments.source), Path(arguments.output)
    if arguments.output.suffix != ".bin":
        raise UserError(f"--output: expected NAME.bin, got {arguments.output}")
    return arguments


def _files(source: Path, wanted: Callable[[str, int], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every wanted file of a folder or an archive."""
    if os.path.isdir(source):
        for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
            name = path.relative_to(source).as_posix()
            if wanted(name, path.stat().st_size) and os.access(path, os.R_OK):
                yield name, path.read_bytes()
        return
    try:
        files.check_regular(source)
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name, member.size):
                    yield member.name, archive.extractfile(member).read()
            while archive.fileobj.read(MIB):  # at its end the compression checks its sum
                pass
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{source}: expected a folder or a tar archive: {files.reason(error)}"
        ) from error


def _text(content: bytes) -> str:
    """Empty for what is no text."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text or text.isspace() else text


def _shuffled(name: str) -> float:
    """Of the reversed name: independent of the hash that chooses what is held out."""
    return data.hash_of_name(name[::-1])


def _first(documents: dict[str, str], mib: float) -> dict[str, str]:
    """As many as `mib` holds, and the one that is too many."""
    taken, result = 0, {}
    for name, text in documents.items():
        if taken >= mib * MIB:
            break
        result[name] = text
        taken += len(text)
    return result


def read_documents(arguments: argparse.Namespace) -> dict[str, str]:
    """Texts by name, in the order of their names' hashes, up to --max-mib in all."""
    suffixes = tuple(arguments.suffixes.split()) or ("",)

    def wanted(name: str, size: int) -> bool:
        fits = name.endswith(suffixes) and size <= arguments.max_file_kib * 1024
        return fits and not any(part in name for part in arguments.skip)

    def first(texts: dict[str, str]) -> dict[str, str]:
        order = sorted(texts, key=lambda name: (_shuffled(name), name))
        return _first({name: texts[name] for name in order}, arguments.max_mib)

    documents, characters = {}, 0
    for name, content in _files(arguments.source, wanted):
        if text := _text(content):
            documents[name] = text
            characters += len(text)
        if characters > 2 * arguments.max_mib * MIB:  # a large source need not be held as a whole
            documents = first(documents)
            characters = sum(map(len, documents.values()))
    documents = first(documents)
    if len(documents) < 2:
        raise UserError(f"{arguments.source}: fewer than two files of text were found")
    return documents


def _encoded(tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    for begin in range(0, len(texts), BATCH):
        yield data.encode(tokenizer, texts[begin : begin + BATCH])


def prepare(arguments: argparse.Namespace) -> dict:
    """Writes the two files; returns what is worth telling."""
    output = arguments.output
    tokenfile.check_place(output)
    with contextlib.ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            # Opened before anything is read: a place that cannot be written is refused at once.
            tokens = stack.enter_context(files.replacing(output))
        except OSError as error:
            reason = files.reason(error)
            raise UserError(f"--output {output}: cannot be written: {reason}") from error
        figures, header = _prepare(arguments, tokens)
        # It takes its place before the tokens do: they would look like somebody else's without it.
        with files.replacing(tokenfile.header_path(output)) as file:
            tokenfile.write_header(file, header)
    return figures | {"bin_mib": round(output.stat().st_size / MIB, 1)}


def _prepare(arguments: argparse.Namespace, file: BinaryIO) -> tuple[dict, tokenfile.Header]:
    """Writes the tokens; figures and header."""
    begin = time.monotonic()
    documents = read_documents(arguments)
    held_out = data.held_out_names(documents)
    texts = {name: text for name, text in documents.items() if name not in set(held_out)}
    read = time.monotonic()
    some = list(_first(texts, arguments.tokenizer_mib).values())
    tokenizer = data.train_tokenizer(some, arguments.vocab_size)
    trained = time.monotonic()
    counts = {"train": 0, "validation": 0}

    def pieces() -> Iterator[np.ndarray]:
        validation = [documents[name] for name in held_out]
        for part, some in (("train", list(texts.values())), ("validation", validation)):
            for piece in _encoded(tokenizer, some):
                counts[part] += len(piece)
                yield piece

    dtype = tokenfile.dtype_for(len(tokenizer))
    digest = tokenfile.write_tokens(file, pieces(), dtype)
    characters = sum(map(len, documents.values()))
    header = tokenfile.Header(
        dtype,
        len(tokenizer),
        counts["train"],
        counts["validation"],
        characters,
        digest,
        program.printable(arguments.source.name),
        [program.printable(name) for name in held_out],
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    figures = {
        "files": len(documents),
        "held_out_files": len(held_out),
        "text_mib": round(characters / MIB, 1),
        "train_tokens": counts["train"],
        "validation_tokens": counts["validation"],
        "characters_per_token": round(characters / sum(counts.values()), 2),
        "seconds_reading": round(read - begin, 1),
        "seconds_tokenizer": round(trained - read, 1),
        "seconds_encoding": round(time.monotonic() - trained, 1),
    }
    return figures, header


def work(argv: list[str], signals: Signals) -> int:
    program.say(json.dumps(prepare(parse(argv)), indent=1))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as of program.run."""
    return program.run("prepare", work, argv)


if __name__ == "__main__":
    sys.exit(main())
