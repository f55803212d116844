"""Tokenised text on disk: NAME.bin holds the tokens, NAME.json beside it says what they are.

    NAME.bin   little-endian uint16 or uint32, the training tokens, then the held-out ones
    NAME.json  type, vocabulary size, counts, SHA-256 of the .bin, source, the tokenizer itself

The tokens are memory-mapped: a file larger than the memory is no trouble.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import files
from .config import DIGEST, MOST_VOCABULARY
from .schema import (
    Rule,
    UserError,
    check_fields,
    instance_of,
    list_of,
    one_of,
    read_json,
    text,
    whole,
)

FORMAT = "sonicmoe-tokens-1"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHUNK = 1 << 24  # tokens looked at at a time


@dataclasses.dataclass
class Header:
    """Content of NAME.json."""

    dtype: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    characters: int  # of the text, both parts
    sha256: str
    source: str
    validation_names: list[str]
    tokenizer: dict  # as the tokenizers library saves it
    format: str = FORMAT

    def digest(self) -> str:
        """Of all that it says, the SHA-256 of the tokens included."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()


RULES: dict[str, Rule] = {
    "dtype": one_of(*DTYPES),
    "vocab_size": whole(1, MOST_VOCABULARY),
    "train_tokens": whole(1, 2**48),
    "validation_tokens": whole(1, 2**48),
    "characters": whole(0, 2**62),
    "sha256": DIGEST,
    "source": text(),
    "validation_names": list_of(text(), least=0),
    "tokenizer": instance_of(dict, "a tokenizer"),
    "format": one_of(FORMAT),
}


@dataclasses.dataclass
class TokenFile:
    """The two parts of the text as memory-mapped arrays."""

    header: Header
    train: np.ndarray
    validation: np.ndarray


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def header_path(path: Path) -> Path:
    return path.with_suffix(".json")


def check_place(path: Path) -> None:
    """UserError where NAME.bin or NAME.json is there and not of this program: they would be
    replaced."""
    place = header_path(path)
    there = [each for each in (path, place) if os.path.lexists(each)]
    try:
        for each in there:
            files.check_regular(each)
        if there:
            check_fields(RULES, read_json(place), str(place))
    except (OSError, UserError) as error:
        raise UserError(
            f"--output {path}: {' and '.join(map(str, there))} would be replaced, and "
            f"{place.name} is no header of tokens: {files.reason(error)}"
        ) from error


def write_tokens(file: BinaryIO, pieces: Iterable[np.ndarray], dtype: str) -> str:
    """Writes arrays one after the other; returns the SHA-256 of all."""
    digest = hashlib.sha256()
    for piece in pieces:
        data = piece.astype(DTYPES[dtype]).tobytes()
        digest.update(data)
        file.write(data)
    return digest.hexdigest()


def write_header(file: BinaryIO, header: Header) -> None:
    file.write(json.dumps(dataclasses.asdict(header)).encode())


def read(path: Path) -> TokenFile:
    """Raises UserError, which names the file and what is wrong with it."""
    place = header_path(path)
    header = Header(
        **check_fields(RULES, read_json(place, f"--data {path}: "), f"--data {path}: {place.name}")
    )
    dtype = DTYPES[header.dtype]
    wanted = (header.train_tokens + header.validation_tokens) * dtype.itemsize
    try:
        size = files.check_regular(path).st_size
        digest = files.sha256(path) if size == wanted else ""
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    if size != wanted:
        raise UserError(f"--data {path}: the file has {size} bytes, {place.name} says {wanted}")
    if digest != header.sha256:
        raise UserError(f"--data {path}: damaged: its SHA-256 is not the one in its header")
    tokens = np.memmap(path, dtype, "r")
    largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK))
    if largest >= header.vocab_size:
        raise UserError(
            f"--data {path}: token {largest} is outside the vocabulary of {header.vocab_size}"
        )
    return TokenFile(header, tokens[: header.train_tokens], tokens[header.train_tokens :])
