"""Sums of the gradients of guests' adapters: added request by request, collected once.

The truth of a training stays with its client.  A sum is soft state: it is taken whole or not at all, and a
client that has lost one asks for its requests again, here or elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import trio
from torch import Tensor

from node.network.prefixes import is_local
from node.runtime.compute_thread import Runner
from node.serving.adapters.store import AdapterStore
from tensor_codec.adapters import AdapterManifest
from tensor_codec.blocks import Blocks
from tensor_codec.errors import Refused, RemoteProtocolError, TooManyStreams
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.gradients import SUM_DTYPES, Collect, Summed, encode_gradients, gradient_ranges
from tensor_codec.span_spec import SpanSpec

AGAIN_SECONDS = 5.0  # another sum was collected or has ended by then
Shape = Mapping[str, tuple[int, int]]  # of a block, see `blob_bytes`
Shapes = Mapping[int, Shape]
Gradients = Mapping[int, Mapping[str, tuple[Tensor, Tensor]]]  # `AdapterGradients` of node.model.adapters
Send = Callable[[list[Buffer]], Awaitable[None]]
_SUM_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(slots=True, eq=False)
class GradientSum:
    """One sum, in float64.  size: bytes that it may come to take.  under_way: its requests now.

    A request is added in the torch thread, whole, and once however often it comes.  Nothing is added once
    the sum is `frozen`: it is being collected.
    """

    peer: str
    prefix: str
    adapter: str
    run: Blocks
    manifest: AdapterManifest
    size: int
    used_at: float
    under_way: int = 0
    frozen: bool = False
    numbers: set[int] = field(default_factory=set)
    _sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, number: int, gradients: Gradients) -> None:
        """Add the gradients of request `number`, float32 on the CPU, unless they are in.

        Runs in the torch thread.  All memory is taken at the first request, before any number is changed.
        """
        if number in self.numbers or self.frozen:
            return
        if not self._sums:
            self._sums = {
                (block, name): (_zeros_like(a), _zeros_like(b))
                for block, sites in gradients.items()
                for name, (a, b) in sites.items()
            }
        for block, sites in gradients.items():
            for name, pair in sites.items():
                for total, own in zip(self._sums[block, name], pair, strict=True):
                    total.add_(own)
        self.numbers.add(number)

    def freeze(self) -> frozenset[int]:
        """The requests in the sum; no other one is added from now on.  Runs in the torch thread."""
        self.frozen = True
        return frozenset(self.numbers)

    def encoded_size(self, dtype: str) -> int:
        """Bytes of `encoded`."""
        return self.size // SUM_DTYPES["fp64"] * SUM_DTYPES[dtype]

    def encoded(self, dtype: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of the sum as it travels, by default all; multiples of a value's bytes.

        Block after block, site after site A [rank, in] and B [out, rank]; of a prefix keys and values.
        dtype: "fp32" or "fp64".  Of a sum with requests in it.  Runs in the torch thread.
        """
        item, parts, at = SUM_DTYPES[dtype], [], 0
        stop = self.encoded_size(dtype) if stop is None else stop
        for block in range(*self.run):
            for site in self.manifest.parts(block):
                for part in self._sums[block, site.name]:
                    first, last = max(start - at, 0) // item, max(stop - at, 0) // item
                    own = part.view(-1)[first:last]
                    parts.append(own.to(_SUM_DTYPES[dtype]).numpy().tobytes())
                    at += part.numel() * item
        return b"".join(parts)


def _zeros_like(gradient: Tensor) -> Tensor:
    return torch.zeros(gradient.shape, dtype=torch.float64)


@dataclass(slots=True)
class GradientSums:
    """The sums of a node, within a budget.  Times are the caller's clock, in seconds.

    capacity: bytes of all sums.  Nobody's sum makes room for another one, except for a peer with a share of
    its own (`Limits.peer_shares`): for it sums are forgotten that no request is adding to.

    Promises, checked by tests/unit/test_gradient_sums.py:
      * the sums never exceed the capacity, nor a peer's or a prefix's share, nor a peer's number;
      * up to a share of its own a peer loses nothing to others, and they make room for it;
      * a sum belongs to the peer that began it, to one adapter and one run of blocks;
      * a sum is collected once at a time, and counts until the last of it was made;
      * what was not used for `sum_idle_seconds` is gone.
    """

    limits: Limits
    capacity: int
    _sums: dict[tuple[str, bytes], GradientSum] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Bytes that all sums may come to take."""
        return sum(each.size for each in self._sums.values())

    def begin(self, name: bytes, wanted: GradientSum) -> GradientSum:
        """The sum of this name, made like `wanted` where there is none; used until `end`.

        Raises TooManyStreams, Refused (it is being collected), and RemoteProtocolError for a name that is
        another sum's.
        """
        key = wanted.peer, name
        self.expire(wanted.used_at)
        found = self._sums.get(key)
        if found is None:
            self._make_room(wanted)
            found = self._sums[key] = wanted
        elif (found.adapter, found.run) != (wanted.adapter, wanted.run):
            raise RemoteProtocolError("a sum of gradients of another adapter, or of other blocks")
        elif found.frozen:
            raise Refused("that sum of gradients is being collected", 0.0)
        found.under_way += 1
        return found

    def end(self, used: GradientSum, now: float) -> None:
        """A request of the sum has ended."""
        used.under_way -= 1
        used.used_at = now

    @contextmanager
    def collecting(self, peer: str, name: bytes, clock: Callable[[], float]) -> Iterator[GradientSum]:
        """A sum that is collected within the context, and forgotten afterwards unless that fails.

        Raises Refused where there is none with a request in it, TooManyStreams while it is collected already.
        """
        found = self._sums.get((peer, name))
        if found is None or not found.numbers:
            raise Refused("no such sum of gradients is here: it has ended, or was collected", 0.0)
        if found.frozen and found.under_way:
            raise TooManyStreams("that sum of gradients is being collected", AGAIN_SECONDS)
        found.frozen = True
        found.under_way += 1
        try:
            yield found
            del self._sums[peer, name]
        finally:
            self.end(found, clock())

    def expire(self, now: float) -> None:
        """Forget the sums that were not used for `sum_idle_seconds`."""
        old = now - self.limits.sum_idle_seconds
        self._sums = {key: each for key, each in self._sums.items() if each.under_way or each.used_at >= old}

    def _make_room(self, wanted: GradientSum) -> None:
        limits, peer, size = self.limits, wanted.peer, wanted.size
        wanted.prefix = limits.prefix_of(peer, wanted.prefix)
        mine = [each for each in self._sums.values() if each.peer == peer]
        if len(mine) >= limits.number_of(peer, limits.max_sums_per_peer, limits.sum_share_per_peer):
            raise TooManyStreams(f"{len(mine)} sums of gradients of yours are open", AGAIN_SECONDS)
        bounds: list[tuple[Sequence[GradientSum], float]] = [
            (mine, limits.share_of(peer, limits.sum_share_per_peer))
        ]
        if not is_local(wanted.prefix):
            near = [each for each in self._sums.values() if each.prefix == wanted.prefix]
            bounds.append((near, limits.adapter_share_per_prefix))
        for sums, share in bounds:
            self._check(size, int(self.capacity * share) - sum(each.size for each in sums))
        victims = self._in_the_way(wanted) if limits.own_share(peer) is not None else []
        self._check(size, self.capacity - self.used + sum(each.size for each in victims))
        self._sums = {key: each for key, each in self._sums.items() if each not in victims}

    def _check(self, size: int, free: int) -> None:
        if size > free:
            raise TooManyStreams(
                f"a sum of {size} bytes of gradients, {max(0, free)} are free", AGAIN_SECONDS
            )

    def _in_the_way(self, wanted: GradientSum) -> list[GradientSum]:
        """Sums that make room for a peer within its own share: of the largest prefix, the oldest first."""
        own, missing = self.limits.own_shares, self.used + wanted.size - self.capacity
        others = [each for each in self._sums.values() if each.peer not in own]
        parts, victims = Counter[str](), list[GradientSum]()
        for each in others:
            parts[each.prefix or each.peer] += each.size
        idle = sorted((each for each in others if not each.under_way), key=lambda each: each.used_at)
        while missing > 0 and idle:
            victim = max(idle, key=lambda each: parts[each.prefix or each.peer])  # the first of the largest
            idle.remove(victim)
            victims.append(victim)
            parts[victim.prefix or victim.peer] -= victim.size
            missing -= victim.size
        return victims


@dataclass(frozen=True, slots=True)
class SpanSums:
    """The sums of a node, for the span that it serves.

    adapters: that its peers have brought.  shapes: (in, out) of the linears of each block of the span.
    """

    sums: GradientSums
    adapters: AdapterStore
    shapes: Callable[[], Shapes]
    compute: Runner

    @contextmanager
    def adding(
        self, peer: str, prefix: str, summed: Summed, spec: SpanSpec
    ) -> Iterator[Callable[[Gradients], None]]:
        """A function for the torch thread that adds the gradients of a request of this peer to its sum.

        Raises Refused, TooManyStreams, RemoteProtocolError.
        """
        assert spec.adapter is not None
        run = spec.blocks
        adapter, manifest = self.adapters.manifest(peer, spec.adapter, run)
        size = sum_size(manifest, run, self.shapes())
        wanted = GradientSum(peer, prefix, adapter, run, manifest, size, trio.current_time())
        used = self.sums.begin(summed.name, wanted)
        try:
            yield partial(used.add, summed.number)
        finally:
            self.sums.end(used, trio.current_time())

    async def collected(self, peer: str, asked: Collect, send: Send) -> list[Buffer]:
        """Send all frames of a sum but the last one, which is returned.

        One frame at a time is made, so a slow client has one of them held.  Raises Refused, PeerFault.
        """
        with self.sums.collecting(peer, asked.name, trio.current_time) as found:
            numbers = await self.compute.run(found.freeze)
            *others, last = gradient_ranges(found.encoded_size(asked.dtype))
            for start, stop in others:
                data = await self.compute.run(found.encoded, asked.dtype, start, stop)
                await send(encode_gradients(numbers, start, data))
                del data
            return encode_gradients(
                numbers, last[0], await self.compute.run(found.encoded, asked.dtype, *last)
            )


def sum_size(manifest: AdapterManifest, run: Blocks, shapes: Shapes) -> int:
    """Bytes of a sum over the blocks of `run`.  shapes: see `blob_bytes`, of each block."""
    values = sum(
        site.rank * sum(shapes[block][site.name]) for block in range(*run) for site in manifest.parts(block)
    )
    return values * SUM_DTYPES["fp64"]
