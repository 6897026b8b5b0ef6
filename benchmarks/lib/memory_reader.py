"""The rate at which a device reads its memory: what the weights of a step are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.compute.shapes import timed
from node.devices import has_own_memory

READ_BYTES = {True: 1 << 32, False: 1 << 28}  # of a GPU, of a CPU: far beyond the caches of both


class MemoryReader:
    """Reads a buffer that is far larger than the caches.

    On a CPU a compiled loop reads it, in huge pages as a span's weights are (node/model/weights/arena.py),
    with as many threads as a step has: nothing reads faster, prefetches included, on the CPUs where it was
    tried.  On other devices it is the better one of torch's sum and copy.
    """

    def __init__(self, device: str, size: int | None = None, threads: int = 1) -> None:
        """size: of the buffer, in bytes."""
        import torch

        self.device = device
        self._size = READ_BYTES[has_own_memory(device)] if size is None else size
        if device.split(":")[0] != "cpu":
            whole = torch.ones(self._size // 4, device=device)
            copied = torch.empty_like(whole[: self._size // 8])
            # The copy reads and writes.
            self._ways: list[Callable[[], object]] = [
                whole.sum,
                lambda: copied.copy_(whole[: self._size // 8]),
            ]
            return
        from numba import njit

        from node.model.weights.arena import WeightArena

        whole = WeightArena(self._size).joined([torch.ones(self._size, dtype=torch.uint8)]).view(torch.int64)
        parts = [part.numpy() for part in whole.chunk(threads)]
        total = njit(nogil=True)(_total)
        pool = ThreadPoolExecutor(threads)
        self._ways = [lambda: list(pool.map(total, parts))]
        self.bytes_per_second()  # compiles

    def bytes_per_second(self) -> float:
        """The best way, each the median of seven times."""
        best = 0.0
        for way in self._ways:
            seconds = [timed(way, self.device) for _ in range(8)]
            best = max(best, self._size / statistics.median(seconds[1:]))
        return best


def _total(numbers: Any) -> int:
    """The sum of int64 [n]: compiled, as many loads under way as the CPU takes."""
    total = 0
    for i in range(numbers.size):
        total += numbers[i]
    return total
