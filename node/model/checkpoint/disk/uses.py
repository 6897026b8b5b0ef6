"""Which processes use which model: a locked file for each use, which the kernel unlocks with the process.

`uses/KIND/FOLDER/REVISION/` holds `used` (its modification time is the last use), `path` (the model's
folder), and a file for each use, locked (flock) as long as the use lasts.  Its content names the files that
the process is about to write, with their bytes.  A process that is killed leaves a file without a lock, which
counts as nothing and is removed with the next use.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from node.config import ConfigError
from node.model.checkpoint.disk.plan import Key
from node.runtime.files import write_atomically

WAIT_SECONDS = 60.0  # for another process that counts or removes; removing 100 GB takes seconds
_USED, _PATH, _LEAVING, _SUFFIX = "used", "path", "leaving", ".use"
_LOCK_TRIES, _LOCK_SECONDS = 1000, 0.001  # somebody who lists the cache holds a lock for microseconds
_MAX_NOTE_BYTES = 1 << 22  # of one use: 30,000 names of files


class Lease:
    """Keeps a model in the cache until it is closed or forgotten, or the process ends."""

    def __init__(self, file: Path | None = None, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._end = weakref.finalize(self, _end, file, descriptor, os.getpid())

    def expect(self, files: Mapping[str, int]) -> None:
        """Note the files that are about to be written, in place of earlier ones.  Raises OSError."""
        if self._descriptor is not None and self._end.alive:
            content = json.dumps(dict(files)).encode()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)

    def close(self) -> None:
        """End the use, now being its last time."""
        self._end()


def _end(file: Path | None, descriptor: int | None, process: int) -> None:
    if file is None or descriptor is None:
        return
    if process == os.getpid():  # a fork's copy only closes
        with suppress(OSError):
            os.utime(file.with_name(_USED))
        with suppress(OSError):
            file.unlink()
    with suppress(OSError):
        os.close(descriptor)


class Uses:
    """The uses of a cache's models.  root: their folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block in one process of the machine at a time.  Raises ConfigError, OSError."""
        from filelock import FileLock, Timeout

        self._root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._root / ".lock")
        try:
            lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            raise ConfigError(
                f"another process has been busy with the model cache for {WAIT_SECONDS:.0f} s;"
                f" it holds {lock.lock_file}"
            ) from None
        except NotImplementedError as error:  # a file system without locks
            raise OSError(errno.ENOLCK, str(error), str(self._root)) from None
        try:
            yield
        finally:
            lock.release()

    def take(self, key: Key, path: Path | None) -> Lease:
        """Begin a use; to be called alone.  path: the model's folder.  Raises OSError."""
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"*{_SUFFIX}"):
            if not _is_locked(file):
                file.unlink(missing_ok=True)
        (folder / _USED).touch()
        if path is not None and self.path_of(key) != path:
            write_atomically(folder / _PATH, os.fsencode(path), durable=False)
        with suppress(FileNotFoundError):
            (folder / _LEAVING).unlink()
        file = folder / f"{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _lock(descriptor)
        except OSError:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            raise
        return Lease(file, descriptor)

    def keys(self) -> list[Key]:
        """The models that have been used."""
        return [
            Key(kind, folder.name, revision.name)
            for kind in ("models", "hub")
            for folder in sorted((self._root / kind).glob("*"))
            for revision in sorted(folder.glob("*"))
        ]

    def is_used(self, key: Key) -> bool:
        """Whether a process uses the model now."""
        return any(_is_locked(file) for file in self._folder(key).glob(f"*{_SUFFIX}"))

    def coming(self, key: Key) -> dict[str, int]:
        """The files that processes are about to write, with their bytes."""
        found: dict[str, int] = {}
        for file in self._folder(key).glob(f"*{_SUFFIX}"):
            if _is_locked(file):
                found |= _read_note(file)
        return found

    def last_used(self, key: Key, now: float) -> float | None:
        """Unix seconds of the last use: `now` for one that lasts; None where none is known."""
        used = self._folder(key) / _USED
        try:
            if self.is_used(key):
                with suppress(OSError):  # kept, should the process be killed
                    os.utime(used, (now, now))
                return now
            return used.stat().st_mtime
        except OSError:
            return None

    def path_of(self, key: Key) -> Path | None:
        """The model's folder at its last use."""
        try:
            return Path(os.fsdecode((self._folder(key) / _PATH).read_bytes()))
        except (OSError, ValueError):
            return None

    def leave(self, key: Key) -> None:
        """Note that the model's removal begins.  Raises OSError."""
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LEAVING).touch()

    def is_leaving(self, key: Key) -> bool:
        """Whether the model's removal has begun."""
        return (self._folder(key) / _LEAVING).is_file()

    def forget(self, key: Key) -> None:
        """Forget a model that is no longer there.  Raises OSError."""
        folder = self._folder(key)
        for file in folder.glob("*"):
            file.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            folder.rmdir()

    def _folder(self, key: Key) -> Path:
        return self._root.joinpath(*key)


def _lock(descriptor: int) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_SECONDS)
        else:
            return
    raise BlockingIOError("the use of a model could not be locked")


def _is_locked(file: Path) -> bool:
    """Whether a process holds the file; one that may not be opened counts as held."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _read_note(file: Path) -> dict[str, int]:
    try:
        with file.open("rb") as opened:
            note = json.loads(opened.read(_MAX_NOTE_BYTES) or b"{}")
    except (OSError, ValueError):
        return {}
    if not isinstance(note, dict):
        return {}
    return {str(name): size for name, size in note.items() if type(size) is int and size >= 0}
