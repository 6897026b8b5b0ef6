"""Tensors one after the other in one mapping of huge pages, in the order in which a step reads them.

A decode step reads every weight once.  With pages of 4 KiB the CPU translates an address for each 64 cache
lines, and in a virtual machine a translation walks two tables: one thread of such a machine read 18 GB/s, and
32 GB/s with pages of 2 MiB.  torch's allocations and files that are mapped get no huge pages.

Linux gives huge pages to mappings that ask for them where /sys/kernel/mm/transparent_hugepage/enabled is
"madvise" or "always".  Elsewhere the mapping has small pages, and everything works.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

HUGE_BYTES = 2 << 20  # of a huge page on x86-64, and on most of ARM64
LINE_BYTES = 64  # a tensor begins with a cache line


def arena_bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes of an arena for copies of these tensors."""
    return sum(-(-tensor.nbytes // LINE_BYTES) * LINE_BYTES for tensor in tensors)


class WeightArena:
    """Memory for copies of tensors; see `arena_bytes` for its size.

    Memory is taken page by page as it is written, and given back as the last views of a tensor end: what is
    dropped from a span does not stay because another part of it does.
    """

    def __init__(self, nbytes: int) -> None:
        self._left = 0
        if nbytes < HUGE_BYTES:  # it would have no huge page
            return
        try:
            self._memory = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # a machine that promises no more memory than it has
            return
        with suppress(AttributeError, OSError):  # not Linux, or a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._left = nbytes
        begin = np.frombuffer(self._memory, np.uint8, 1).ctypes.data
        self._at = -begin % HUGE_BYTES

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """A copy of tensors [n, ...] of one dtype on the CPU, one after the other: [sum of n, ...].

        In torch's own memory where the arena has no room left.
        """
        parts = [part.detach() for part in parts]
        nbytes = sum(part.nbytes for part in parts)
        taken = -(-nbytes // LINE_BYTES) * LINE_BYTES
        if not nbytes or taken > self._left:
            return torch.cat(parts)
        memory = np.frombuffer(self._memory, np.uint8, nbytes, self._at)
        first = -(-self._at // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self._at + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:  # whole pages of its own
            give_back = weakref.finalize(
                memory, self._memory.madvise, mmap.MADV_DONTNEED, first, last - first
            )
            give_back.atexit = False
        self._left -= taken
        self._at += taken
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        whole = torch.from_numpy(memory).view(parts[0].dtype).view(shape)
        return torch.cat(parts, out=whole)
