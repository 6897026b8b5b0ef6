"""Memory that is reserved whole and taken page by page as it is written to."""

from __future__ import annotations

import ctypes
import mmap
import platform
from contextlib import suppress

# Python has a name for it from 3.13 on.  Without it a system may refuse sizes that are rarely used whole.
_NUMBER = 0x4000 if platform.machine() in ("x86_64", "aarch64") and platform.system() == "Linux" else 0
NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", _NUMBER)


def set_aside(size: int) -> mmap.mmap:
    """`size` zero bytes, in pages of the smallest size.  Raises MemoryError where the system has too few."""
    # Private: the system keeps shared pages even after MADV_DONTNEED.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size} bytes of memory are not to be had here: {error}") from None
    # The used bytes lie far apart: with pages of 2 MiB a few tokens would take all of the memory.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def forget(address: int, size: int) -> None:
    """Give the whole system pages of this part of a `set_aside` back; they read as zeros afterwards.

    Only under Linux: elsewhere the call may mean something else, and nothing is done.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if platform.system() == "Linux" and first < last:
        system = ctypes.CDLL(None)
        system.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
