"""Functions as machine code: from numba's cache, or compiled by one of the processes that start at once.

A compiler takes seconds and holds the interpreter's lock meanwhile, so nothing is compiled twice: a process
that finds another one compiling a function waits for it, and then reads the cache.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, njit
from numba.core.errors import NumbaError

Kernel = Callable[..., Any]
WAIT_SECONDS = 60.0  # for another process's compiler: a function takes some seconds, more on a busy machine
LOOK_SECONDS = 0.02  # between two looks whether it is done
_SOURCES = ("compiling.py", "kernels.py", "low_rank_kernel.py", "decode_kernels.py")

# numba's cache knows the age of a function's own file alone, so keys of the cache must include all files.
FINGERPRINT = zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in _SOURCES))

# No writable folder, a full disk, or a truncated file.
_CACHE_FAULTS = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, NumbaError)


def compiled(function: Callable[..., Any], signature: Any, **options: Any) -> Kernel:
    """The function as machine code for Python, from the cache if it is there and can be used.

    options: of numba's, besides nogil.
    """
    with _alone(function):
        try:
            return njit(signature, nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
        except _CACHE_FAULTS:
            return njit(signature, nogil=True, **options)(function)  # type: ignore[no-any-return]


def callback(function: Callable[..., Any], signature: Any) -> Any:
    """The function as machine code for other compiled code, which calls it by `address`.

    Where it raises, it answers 0: it must answer something else where it does not.
    """
    with _alone(function):
        try:
            return cfunc(signature, nopython=True, cache=True)(function)
        except _CACHE_FAULTS:
            return cfunc(signature, nopython=True)(function)


@contextmanager
def _alone(function: Callable[..., Any]) -> Iterator[None]:
    """Hold this function's lock among the processes with this cache.

    Without a folder that can be written, or after WAIT_SECONDS, without the lock.
    """
    folder = Path(numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(
            folder / f"{function.__module__}.{function.__name__}.lock", os.O_RDWR | os.O_CREAT, 0o600
        )
    except OSError:
        yield
        return
    try:
        until = time.monotonic() + WAIT_SECONDS
        while not _is_locked(file) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    """Whether this process has the lock now, or could not have it here at all."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
