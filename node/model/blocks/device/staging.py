"""What a step needs on a device, in one run of bytes: one copy brings it there, and nobody waits for it.

The bytes lie in page-locked memory on the host, so that the copy runs next to the host's work.  torch's
allocator of such memory gives a piece out again only after the copies from it are done: a step that follows
at once writes nowhere into the last one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED_BYTES = 64  # of each part of the bytes: kernels read 16 at a time
WAITED = frozenset({"mps"})  # its copies read the host's memory later, and nothing keeps it until then
FIRST_PAGES = 64  # pages of a row in the narrowest table: 1,024 positions


def bucket(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`; `least` is a power of two."""
    return max(least, 1 << (number - 1).bit_length())


def host_bytes(count: int, device: torch.device) -> Tensor:
    """Bytes on the host for a copy to `device`, uint8 [count]."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")


def on_device(hidden: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Hidden states on a device in a dtype; from a CPU nobody waits for the copy."""
    if device.type == "cpu" or hidden.device.type != "cpu":
        return hidden.to(device, dtype)
    host = torch.empty(hidden.shape, dtype=dtype, pin_memory=device.type == "cuda")
    return _sent(host.copy_(hidden), device)


class Coming:
    """A tensor on its way from a device to the host."""

    def __init__(self, there: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if there.device.type != "cuda":
            self._host = there.cpu()
            return
        self._host = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        with torch.cuda.device(there.device):
            self._host.copy_(there, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_here(self) -> bool:
        """Whether nobody has to wait any more."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The tensor on the host, when it is here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def numbers_on(device: torch.device, *arrays: NDArray[np.int64]) -> list[Tensor]:
    """These arrays as int64 tensors on a device, by one copy; on a CPU without any."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays]
    host = host_bytes(8 * sum(each.size for each in arrays), device).view(torch.int64)
    flat, first = host.numpy(), 0
    for each in arrays:
        flat[first : first + each.size] = each.ravel()
        first += each.size
    there = _sent(host, device)
    parts = torch.split(there, [each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]


@dataclass(slots=True)
class Stage:
    """Everything that a step needs on a device, gathered on the host first: one copy brings all of it.

    Parts are added and numbered, `send` brings them with the hidden states, and from then on they are read.
    dtype: of hidden states.  A CPU takes arrays as they are.
    """

    device: torch.device
    dtype: torch.dtype
    _sizes: list[int] = field(default_factory=list, init=False)
    _writes: list[Callable[[Tensor], object]] = field(default_factory=list, init=False)
    _views: list[Callable[[Tensor], Tensor]] = field(default_factory=list, init=False)
    _there: list[Tensor] = field(default_factory=list, init=False)

    def add(self, array: NDArray[np.int64]) -> int:
        """Bring an array; its number.  It arrives as an int64 tensor of its shape."""
        if self.device.type == "cpu":
            self._there.append(torch.from_numpy(np.ascontiguousarray(array)))
            return len(self._there) - 1

        def write(content: Tensor) -> None:
            content.view(torch.int64).numpy()[:] = array.ravel()

        return self._added(8 * array.size, write, lambda content: content.view(torch.int64).view(array.shape))

    def add_bytes(self, count: int, write: Callable[[Tensor], object]) -> int:
        """Bring bytes that `write` writes into its argument, uint8 [count]; their number."""
        return self._added(count, write, lambda content: content)

    def send(self, hidden: Tensor) -> Tensor:
        """Bring all parts, and the hidden states: on the device in the stage's dtype."""
        if not self._sizes:
            return on_device(hidden, self.device, self.dtype)
        staged = hidden.device.type == "cpu"
        own = hidden.numel() * self.dtype.itemsize if staged else 0
        wide = [*map(_aligned, self._sizes), own]
        host = host_bytes(sum(wide), self.device)
        *parts, last = torch.split(host, wide)
        for part, size, write in zip(parts, self._sizes, self._writes, strict=True):
            write(part[:size])
        if staged:
            last.view(self.dtype).view(hidden.shape).copy_(hidden)
        *parts, last = torch.split(_sent(host, self.device), wide)
        self._there = [
            view(part[:size]) for part, size, view in zip(parts, self._sizes, self._views, strict=True)
        ]
        if staged:
            return last.view(self.dtype).view(hidden.shape)
        return hidden.to(self.device, self.dtype)

    def __getitem__(self, number: int) -> Tensor:
        """A part on the device, after `send`."""
        return self._there[number]

    def _added(self, size: int, write: Callable[[Tensor], object], view: Callable[[Tensor], Tensor]) -> int:
        self._sizes.append(size)
        self._writes.append(write)
        self._views.append(view)
        return len(self._sizes) - 1


def chunk_on(
    device: torch.device, dtype: torch.dtype, hidden: Tensor, *arrays: NDArray[np.int64]
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states in a dtype and arrays as int32 tensors, both on a device, by one copy."""
    sizes = [_aligned(4 * each.size) for each in arrays]
    staged = hidden.device.type == "cpu"
    own = hidden.numel() * dtype.itemsize if staged else 0
    host = host_bytes(sum(sizes) + own, device)
    *parts, last = torch.split(host, [*sizes, own])
    for part, each in zip(parts, arrays, strict=True):
        part[: 4 * each.size].view(torch.int32).numpy()[:] = each.ravel()
    if staged:
        last.view(dtype).view(hidden.shape).copy_(hidden)
    *parts, last = torch.split(_sent(host, device), [*sizes, own])
    numbers = [
        part[: 4 * each.size].view(torch.int32).view(each.shape)
        for part, each in zip(parts, arrays, strict=True)
    ]
    return last.view(dtype).view(hidden.shape) if staged else hidden.to(device, dtype), numbers


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step on a device.

    hidden: [rows, hidden_size].  The others are int32: places [rows], the position of each row in its
    session; slots [rows], where its keys and values go; lengths [rows], positions that it sees, its own
    included; pages [rows, pages], the numbers of its pages.
    """

    hidden: Tensor
    places: Tensor
    slots: Tensor
    lengths: Tensor
    pages: Tensor


@dataclass(frozen=True)
class Layout:
    """Where a step's inputs lie in its bytes: the numbers first, then the hidden states."""

    rows: int
    pages: int
    hidden_size: int
    dtype: torch.dtype

    @cached_property
    def numbers_bytes(self) -> int:
        """Bytes of all numbers, with the gaps between them."""
        return 3 * _aligned(4 * self.rows) + _aligned(4 * self.rows * self.pages)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self.numbers_bytes + self.rows * self.hidden_size * self.dtype.itemsize

    def numbers(self, content: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """places, slots, lengths and pages as views of bytes, uint8 [numbers_bytes] at least."""
        step, wide = _aligned(4 * self.rows), 4 * self.rows
        places, slots, lengths = (
            content[each * step : each * step + wide].view(torch.int32) for each in range(3)
        )
        pages = content[3 * step : 3 * step + wide * self.pages].view(torch.int32)
        return places, slots, lengths, pages.view(self.rows, self.pages)

    def hidden(self, content: Tensor) -> Tensor:
        """The hidden states as a view of bytes, uint8 [nbytes]."""
        return content[self.numbers_bytes : self.nbytes].view(self.dtype).view(self.rows, self.hidden_size)

    def inputs(self, content: Tensor) -> Inputs:
        """Everything as views of bytes, uint8 [nbytes]."""
        return Inputs(self.hidden(content), *self.numbers(content))


@dataclass(frozen=True, slots=True)
class Rows:
    """The numbers of a step on the host; see `Inputs`.  lengths: without the new position.

    pages: [rows, pages], as many as the longest row needs.
    """

    lengths: NDArray[np.int64]
    slots: NDArray[np.int64]
    pages: NDArray[np.int64]

    def fill(self, content: Tensor, layout: Layout, nobodys_page: int, page_tokens: int) -> None:
        """Write the numbers into bytes on the host, uint8 [layout.numbers_bytes] at least.

        Rows of the layout that are not there see one position, that of `nobodys_page`, and write to it.
        """
        count, width = self.pages.shape
        places, slots, lengths, pages = (each.numpy() for each in layout.numbers(content))
        places[:count], places[count:] = self.lengths, 0
        slots[:count], slots[count:] = self.slots, nobodys_page * page_tokens
        lengths[:count], lengths[count:] = self.lengths + 1, 1
        pages.fill(nobodys_page)
        pages[:count, :width] = self.pages


NOBODY = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 0), np.int64))


def to_device(
    rows: Rows, layout: Layout, hidden: Tensor, content: Tensor, nobodys_page: int, page_tokens: int
) -> None:
    """Bring a step into these bytes, uint8 [layout.nbytes], on a device.  hidden: [rows, hidden_size].

    One copy, and for hidden states that are on a device already one more there.
    """
    count, staged = len(hidden), hidden.device.type == "cpu"
    host = host_bytes(layout.nbytes if staged else layout.numbers_bytes, content.device)
    rows.fill(host, layout, nobodys_page, page_tokens)
    own = layout.hidden(host if staged else content)
    if staged:
        own[:count].copy_(hidden)
    if count < layout.rows:  # what another step left there may be infinite
        own[count:].zero_()
    content[: len(host)].copy_(host, non_blocking=content.device.type not in WAITED)
    if not staged:
        own[:count].copy_(hidden)


def from_stage(numbers: Tensor, layout: Layout, hidden: Tensor, content: Tensor) -> None:
    """`to_device` of a step whose numbers, uint8 [layout.numbers_bytes], and hidden states are there."""
    own = layout.hidden(content)
    if len(hidden) < layout.rows:
        own[len(hidden) :].zero_()
    content[: layout.numbers_bytes].copy_(numbers)
    own[: len(hidden)].copy_(hidden)


def _sent(host: Tensor, device: torch.device) -> Tensor:
    return host.to(device, non_blocking=device.type not in WAITED)


def _aligned(count: int) -> int:
    return -(-count // ALIGNED_BYTES) * ALIGNED_BYTES
