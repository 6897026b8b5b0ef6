"""Small secrets on disk: written whole or not at all, readable by their owner alone."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from node.config import ConfigError
from node.runtime.files import NEW_FILE, make_private_folder, part_name, write_fault

_MAX_SECRET_BYTES = 4096


def read_secret(path: Path, what: str) -> bytes:
    """The bytes of a secret file.  Raises FileNotFoundError, or ConfigError where it is not private.

    Private is a regular file of this user, or of root, that nobody else may read.
    what: its name in an error, as in "identity".
    """
    try:
        # Opened without waiting: a FIFO may have no writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{what} {path} is not a regular file")
            if os.name == "posix" and status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise ConfigError(
                    f"{what} {path} has mode {mode:04o}, others can read it; run: chmod 600 {path}"
                )
            if os.name == "posix" and status.st_uid not in (0, me := os.geteuid()):
                raise ConfigError(
                    f"{what} {path} belongs to user {status.st_uid}, who can change it;"
                    f" run: chown {me} {path}"
                )
            return file.read(_MAX_SECRET_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error


def create_secret(path: Path, content: bytes, what: str) -> None:
    """Write a new secret file of mode 0600, whole under its final name or not there at all.

    Its missing folders are made too, of mode 0700.

    Raises FileExistsError where there is one already, ConfigError where it cannot be written.
    """
    if not path.name:
        raise ConfigError(f"{what} {path} is a folder, a file is needed")
    part = part_name(path)
    try:
        make_private_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"cannot make the folder of {what} {path}: {error.strerror}") from error
    try:
        descriptor = os.open(part, NEW_FILE, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, fails where another process was faster
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(
            f"cannot write {what} {path} ({len(content)} bytes): {write_fault(error, path)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
