"""Reading what others may have left, and writing so that nothing half-written is ever found."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 24  # bytes hashed at a time
MOST = 1 << 28  # bytes of a file that is read as a whole


def reason(error: BaseException) -> str:
    """The first line of what went wrong, without the number and the file of an OSError."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (told.strip() or type(error).__name__).splitlines()[0][:300]


def system_error(error: BaseException) -> BaseException:
    """The OSError during whose handling `error` came: a library's own hides it. Else `error`
    itself."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind or error


def check_regular(path: Path) -> os.stat_result:
    """OSError for what is no file with an end: a named pipe waits for ever, a device never ends."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return status


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """OSError for all but a regular file of at most `most` bytes."""
    if check_regular(path).st_size > most:
        raise OSError(errno.EFBIG, f"More than {most >> 20} MiB", str(path))
    return path.read_bytes()


def _object(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same name twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def parse_json(content: bytes) -> object:
    """Strict JSON: UTF-8 with or without a mark at its beginning, no NaN, no name twice. ValueError
    or RecursionError."""
    return json.loads(
        content.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_object
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def below(folder: Path) -> list[Path]:
    """All in a folder and its folders that is no folder itself, in the order of the names."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once it is complete and on the disk; after a
    failure nothing of it is left. An OSError names `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link to elsewhere
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    with replacing(path) as file:
        file.write(content.encode("utf-8"))
