"""Functions as machine code: from the cache, or compiled by one of the processes that start at once.

A compiler takes seconds and holds the interpreter's lock meanwhile, so a machine compiles nothing twice: a
process that finds another one compiling a function waits for it, and then reads the cache
(node/model/weights/kernel_cache.py).

Processes that start at once on a new machine divide the functions among them (`in_any_order`).
"""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import cfunc, njit
from numba.core.errors import NumbaError

from node.model.weights import kernel_cache

Kernel = Callable[..., Any]
WAIT_SECONDS = 60.0  # for another process's compiler: a function takes some seconds, more on a busy machine
LOOK_SECONDS = 0.02  # between two looks whether it is done

# No writable folder, a full disk, or a file that is no pickle of numba's.
_CACHE_FAULTS = (
    OSError, RuntimeError, EOFError, pickle.UnpicklingError, NumbaError,
    ValueError, TypeError, LookupError, AttributeError, ImportError,
)  # fmt: skip


def compiled(function: Callable[..., Any], signature: Any, **options: Any) -> Kernel:
    """The function as machine code for Python, from the cache if it is there and can be used.

    options: of numba's, besides nogil.
    """
    return _kept(  # type: ignore[no-any-return]
        function, lambda keep: njit(signature, nogil=True, cache=keep, **options)(function)
    )


def in_any_order(kernels: Sequence[Callable[[], object]]) -> None:
    """Call all of these, which compile or read; first those that no other process compiles at the moment.

    So processes that start at once compile different kernels.
    """
    left = list(kernels)
    while left:
        _compiling.waits, busy = False, []
        try:
            for kernel in left:
                try:
                    kernel()
                except _OtherCompiles:
                    busy.append(kernel)
        finally:
            _compiling.waits = True
        if len(busy) == len(left):
            busy.pop(0)()
        left = busy


def callback(function: Callable[..., Any], signature: Any) -> Any:
    """The function as machine code for other compiled code, which calls it by `address`.

    Where it raises, it answers 0: it must answer something else where it does not.
    """
    return _kept(function, lambda keep: cfunc(signature, nopython=True, cache=keep)(function))


def _kept(function: Callable[..., Any], make: Callable[[bool], Any]) -> Any:
    """The answer of `make(True)`, which may use the cache; of `make(False)` where there is none.

    Files that cannot be read are removed, and the function is compiled anew.
    """
    folder = kernel_cache.opened()
    if folder is None:
        return make(False)
    with _alone(folder, function):
        try:
            return make(True)
        except _CACHE_FAULTS:
            kernel_cache.forget(folder, function)
        try:
            return make(True)
        except _CACHE_FAULTS:
            return make(False)


class _OtherCompiles(Exception):
    """Another process has this function's lock."""


class _Compiling(threading.local):
    """waits: whether this thread waits for other processes."""

    waits = True


_compiling = _Compiling()


@contextmanager
def _alone(folder: Path, function: Callable[..., Any]) -> Iterator[None]:
    """Hold this function's lock among the processes with this cache.

    Where no file can be made, or after WAIT_SECONDS, without the lock.  Raises _OtherCompiles within
    `in_any_order`.
    """
    try:
        file = os.open(
            folder / f"{function.__module__}.{function.__name__}.lock", os.O_RDWR | os.O_CREAT, 0o600
        )
    except OSError:
        yield
        return
    try:
        if not _compiling.waits and not _is_locked(file):
            raise _OtherCompiles
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
