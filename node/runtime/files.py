"""Files written whole or not at all, and the disk's errors in one line."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from node.config import ConfigError
from tensor_codec.limits import Limits

USUAL = Limits()
SMALL_DISK_PART = 10  # of a smaller disk the tenth part stays free
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)


def part_name(path: Path) -> Path:
    """A name beside `path` that nobody can guess: in a shared folder it could be taken beforehand."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a whole file or none, readable at once under its name.  Raises OSError.

    A link under this name is replaced, not followed.  durable: also after the machine loses its power.
    """
    part = part_name(path)
    try:
        with os.fdopen(os.open(part, NEW_FILE, 0o666), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        error.filename = str(path)
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def make_private_folder(path: Path) -> None:
    """Make a folder and the missing ones above it, of mode 0700 under any umask.  Raises OSError."""
    if path.is_dir():
        return
    if path.parent != path:
        make_private_folder(path.parent)
    path.mkdir(0o700, exist_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's error into one line for the operator: the path, and the bytes if the disk is full."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in NO_SPACE:
            free = free_disk_bytes(path)
            raise ConfigError(f"the disk is full: writing {where} failed with {free} bytes free") from error
        raise ConfigError(f"cannot write {where}: {error.strerror}") from error


def write_fault(error: OSError, path: Path) -> str:
    """The reason why `path` could not be written; of a full disk with its free bytes."""
    free = f", {free_disk_bytes(path)} bytes are free" if error.errno in NO_SPACE else ""
    return f"{error.strerror}{free}"


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the file system that `path` is in, or would be in once its folders are made."""
    return _disk(path)[1]


def check_free_disk(path: Path, needed: int, what: str, limits: Limits = USUAL) -> None:
    """Raise ConfigError unless so many bytes fit into the disk of `path`, and enough stays free for others.

    what: needs them.  A disk that is full stops other programs, and those of the system.
    """
    total, free = _disk(path)
    spare = min(limits.min_free_disk_bytes, total // SMALL_DISK_PART)
    if free - needed < spare:
        raise ConfigError(f"{path} has {free} bytes free, {what} needs {needed} and leaves {spare} to others")


def _disk(path: Path) -> tuple[int, int]:
    """The size of the file system that `path` is in, and its free bytes; 0 where it cannot be read."""
    for each in (path, *path.absolute().parents):
        with suppress(OSError):
            usage = shutil.disk_usage(each)
            return usage.total, usage.free
    return 0, 0
