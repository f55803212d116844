"""Entry point: python -m pretrain.prepare SOURCE --output NAME.bin: text to tokens.

SOURCE is a folder or a tar archive (compressed or not) of text, for example the sources that a
Debian package brings. Files are taken in an order that their names' hashes give, up to --max-mib of
text, so every part of a large source is there in proportion. The tokenizer is trained on the first
of the training files, --tokenizer-mib of them. Prints what was measured as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import data, tokenfile
from .config import UserError

MIB = 1 << 20
SUFFIXES = ".c .h .S .py .rst .txt .md .html .cc .cpp .rs .dts .dtsi .sh .pl Makefile Kconfig"
BATCH = 1024  # documents tokenised at a time


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder or a tar archive")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.bin")
    parser.add_argument("--vocab-size", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument(
        "--max-mib", type=float, default=400, metavar="X", help="text taken (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer-mib",
        type=float,
        default=48,
        metavar="X",
        help="text the tokenizer is trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--max-file-kib",
        type=float,
        default=256,
        metavar="X",
        help="larger files, mostly generated tables, are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--suffixes",
        default=SUFFIXES,
        help="endings of the names taken, separated by blanks; '' takes all (default: %(default)r)",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="TEXT",
        help="leave out files whose name holds TEXT; may be repeated",
    )
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".bin":
        parser.error("--output must end in .bin")
    if not 257 <= arguments.vocab_size < 1 << 32:
        parser.error("--vocab-size must be at least 257")
    return arguments


def _files(source: Path) -> Iterator[tuple[str, int, object]]:
    """Name, bytes and a way to read the bytes of every file of a folder or an archive."""
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.is_file() and not p.is_symlink()):
            yield path.relative_to(source).as_posix(), path.stat().st_size, path.read_bytes
        return
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, member.size, archive.extractfile(member).read
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{source}: neither a folder nor a tar archive: {error}") from error


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


def read_documents(arguments: argparse.Namespace) -> dict[str, str]:
    """Texts by name, in the order of their names' hashes, up to --max-mib in all."""
    suffixes = tuple(arguments.suffixes.split()) or ("",)
    texts = {}
    for name, size, read in _files(arguments.source):
        wanted = name.endswith(suffixes) and size <= arguments.max_file_kib * 1024
        if wanted and not any(part in name for part in arguments.skip):
            texts[name] = _text(read())
    documents, taken = {}, 0
    for name in sorted(texts, key=lambda name: (_shuffled(name), name)):
        if texts[name] and taken < arguments.max_mib * MIB:
            documents[name] = texts[name]
            taken += len(texts[name])
    if len(documents) < 2:
        raise UserError(f"{arguments.source}: fewer than two files of text were found")
    return documents


def _first(texts: list[str], mib: float) -> list[str]:
    taken, result = 0, []
    for text in texts:
        if taken >= mib * MIB:
            break
        result.append(text)
        taken += len(text)
    return result


def _encoded(tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    for begin in range(0, len(texts), BATCH):
        yield data.encode(tokenizer, texts[begin : begin + BATCH])


def prepare(arguments: argparse.Namespace) -> dict:
    """Writes the two files; returns what is worth telling."""
    begin = time.monotonic()
    documents = read_documents(arguments)
    order = list(documents)
    corpus = data.split_by_file(documents, str(arguments.source))
    texts = [documents[name] for name in order if name not in set(corpus.validation_names)]
    read = time.monotonic()
    tokenizer = data.train_tokenizer(_first(texts, arguments.tokenizer_mib), arguments.vocab_size)
    trained = time.monotonic()
    counts = {"train": 0, "validation": 0}

    def pieces() -> Iterator[np.ndarray]:
        for part, some in (("train", texts), ("validation", corpus.validation)):
            for piece in _encoded(tokenizer, some):
                counts[part] += len(piece)
                yield piece

    dtype = tokenfile.dtype_for(len(tokenizer))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    _, digest = tokenfile.write_tokens(arguments.output, pieces(), dtype)
    characters = sum(map(len, documents.values()))
    tokenfile.write_header(
        arguments.output,
        tokenfile.Header(
            dtype,
            len(tokenizer),
            counts["train"],
            counts["validation"],
            characters,
            digest,
            arguments.source.name,
            corpus.validation_names,
            json.loads(tokenizer.backend_tokenizer.to_str()),
        ),
    )
    return {
        "files": len(documents),
        "held_out_files": len(corpus.validation_names),
        "text_mib": round(characters / MIB, 1),
        "train_tokens": counts["train"],
        "validation_tokens": counts["validation"],
        "characters_per_token": round(characters / sum(counts.values()), 2),
        "bin_mib": round(arguments.output.stat().st_size / MIB, 1),
        "seconds_reading": round(read - begin, 1),
        "seconds_tokenizer": round(trained - read, 1),
        "seconds_encoding": round(time.monotonic() - trained, 1),
    }


def main(argv: list[str] | None = None) -> int:
    try:
        print(json.dumps(prepare(parse(argv)), indent=1))
    except UserError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
