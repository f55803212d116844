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

import numpy as np

from .config import UserError

FORMAT = "sonicmoe-tokens-1"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHUNK = 1 << 24  # bytes hashed, or tokens looked at, at a time


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


def write_tokens(path: Path, pieces: Iterable[np.ndarray], dtype: str) -> tuple[int, str]:
    """Writes arrays one after the other; returns the number of tokens and the SHA-256 of all."""
    digest, count = hashlib.sha256(), 0
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for piece in pieces:
            data = piece.astype(DTYPES[dtype]).tobytes()
            digest.update(data)
            file.write(data)
            count += len(piece)
    os.replace(temporary, path)
    return count, digest.hexdigest()


def write_header(path: Path, header: Header) -> None:
    header_path(path).write_text(json.dumps(dataclasses.asdict(header)), encoding="utf-8")


def read(path: Path) -> TokenFile:
    """Raises UserError, which names the file and what is wrong with it."""
    header = _read_header(path)
    dtype = DTYPES[header.dtype]
    wanted = (header.train_tokens + header.validation_tokens) * dtype.itemsize
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    if size != wanted:
        raise UserError(
            f"--data {path}: the file has {size} bytes, {header_path(path).name} says {wanted}"
        )
    if not header.train_tokens or not header.validation_tokens:
        raise UserError(f"--data {path}: no training tokens, or none held out")
    tokens = np.memmap(path, dtype, "r")
    if _digest(path) != header.sha256:
        raise UserError(f"--data {path}: damaged: its SHA-256 is not the one in its header")
    largest = max(int(tokens[i : i + CHUNK].max()) for i in range(0, len(tokens), CHUNK))
    if largest >= header.vocab_size:
        raise UserError(
            f"--data {path}: token {largest} is outside the vocabulary of {header.vocab_size}"
        )
    return TokenFile(header, tokens[: header.train_tokens], tokens[header.train_tokens :])


def _read_header(path: Path) -> Header:
    place = header_path(path)
    try:
        fields = json.loads(place.read_text(encoding="utf-8"))
        header = Header(**fields)
    except OSError as error:
        raise UserError(f"--data {path}: cannot read {place}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--data {path}: {place.name} is no header of tokens: {error}") from error
    if header.format != FORMAT or header.dtype not in DTYPES:
        raise UserError(
            f"--data {path}: {place.name} says format {header.format!r}, type {header.dtype!r}; "
            f"expected {FORMAT!r}, {' or '.join(DTYPES)}"
        )
    return header


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
