"""Bringing an adapter to the servers of a chain, and remembering which of them have it.

A server keeps an adapter for a while after its last use.  What a client remembers saves it a question; where
it is wrong the server says `no_adapter`, and the adapter is brought to that server once more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from client.chains.chooser import PeerStream
from routing.blocks import Blocks
from routing.chains.alternatives import Constraints
from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.adapters import MAX_VALUE, AdapterContent
from tensor_codec.errors import PeerFault, PeerGone, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import (
    HeldAdapter,
    Offer,
    decode_held,
    decode_need_or_held,
    encode_blob_part,
    encode_offer,
    pieces,
)
from tensor_codec.messages.fields import Failed
from tensor_codec.span_spec import SpanSpec

if TYPE_CHECKING:
    from node.model.checkpoint.info import ModelInfo

MAX_REMEMBERED = 4096  # pairs of a server and an adapter: a training has a new adapter with every step
MARGIN_SECONDS = 5.0  # before a server forgets an adapter, for a request on its way


async def offer(stream: PeerStream, content: AdapterContent, spec: SpanSpec, limits: Limits) -> HeldAdapter:
    """Bring an adapter for the blocks of `spec`; the server gets the blobs that it lacks.

    Raises PeerFault, and Refused where the server takes none now.
    """
    run = spec.blocks
    size = sum(len(content.blobs[block]) for block in range(*run))
    seconds = limits.adapter_upload_seconds + size / limits.frame_floor_bytes_per_second
    with trio.move_on_after(seconds):
        await stream.send(encode_offer(Offer(spec, content.manifest, content.digests)))
        answer = decode_need_or_held(await _frame(stream), run)
        if not isinstance(answer, HeldAdapter | Failed):
            frame = await _sent(stream, content, answer.blocks)
            answer = decode_held(frame)
        if isinstance(answer, Failed):
            raise answer.error()
        return answer
    raise SlowPeer(f"{stream.peer} did not take an adapter of {size} bytes within {seconds:.3g} s")


async def _frame(stream: PeerStream) -> Buffer:
    frame = await stream.receive()
    if frame is None:
        raise PeerGone(f"{stream.peer} closed the stream instead of answering")
    return frame


async def _sent(stream: PeerStream, content: AdapterContent, blocks: tuple[int, ...]) -> Buffer:
    """Send the blobs of these blocks, and return the server's answer, which may come before the end."""
    fault: PeerFault | None = None
    answer: Buffer | None = None

    async def send() -> None:
        nonlocal fault
        try:
            for block in blocks:
                for part in pieces(block, content.blobs[block]):
                    await stream.send(encode_blob_part(part))
        except PeerFault as error:
            fault = error  # the answer says why

    async def receive() -> None:
        nonlocal fault, answer
        try:
            answer = await _frame(stream)
        except PeerFault as error:
            fault = fault or error
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
    if answer is None:
        raise fault or PeerGone(f"{stream.peer} has not answered")
    return answer


class HasContent(Protocol):
    """An adapter that is trained: `client.adapters` has the one of this project."""

    @property
    def is_in_blocks(self) -> bool:
        """Whether servers need any of it."""

    def content(self) -> AdapterContent:
        """The adapter as it is now."""


AnyAdapter = AdapterContent | HasContent | str  # str: the name of an adapter that servers keep


def check_values(content: AdapterContent) -> None:
    """Raise ValueError for a value that is not finite, or larger than servers take (MAX_VALUE)."""
    import torch

    dtype = torch.bfloat16 if content.manifest.dtype == "bf16" else torch.float32
    for block, blob in enumerate(content.blobs):
        if not blob:
            continue
        low, high = torch.frombuffer(bytearray(blob), dtype=dtype).float().aminmax()
        largest = max(-float(low), float(high))
        if not largest <= MAX_VALUE:  # NaN neither
            raise ValueError(
                f"an adapter's values in block {block} reach {largest:g}, {MAX_VALUE:g} is allowed"
            )


@dataclass(slots=True)
class AdapterUploads:
    """The adapters that this client has brought to servers.  Times are trio's clock.

    info: of the model.  open_stream: of ADAPTER_PROTOCOL to a server.
    """

    limits: Limits
    info: ModelInfo
    open_stream: Callable[[PeerId], Awaitable[PeerStream]]
    _held: OrderedDict[tuple[PeerId, str], tuple[frozenset[int], float]] = field(default_factory=OrderedDict)
    _under_way: dict[tuple[PeerId, str], trio.Lock] = field(default_factory=dict)
    _sound: OrderedDict[str, None] = field(default_factory=OrderedDict)  # ids of adapters with good values

    def use_of(self, adapter: AnyAdapter | None, view: SwarmView) -> AdapterUse | None:
        """The adapter of a session or a call, as it is now; None for none, and for one without a site.

        view: of the swarm, for the name of an adapter that servers keep.
        Raises ValueError for an adapter of another model, and for values that no server takes.
        """
        if adapter is None:
            return None
        if isinstance(adapter, str):
            return AdapterUse(kept_name(adapter, view.records(), self.info.revision), None, self)
        if not (isinstance(adapter, AdapterContent) or adapter.is_in_blocks):
            return None
        content = adapter if isinstance(adapter, AdapterContent) else adapter.content()
        manifest = content.manifest
        if manifest.revision != self.info.revision or len(manifest.blocks) != self.info.blocks:
            raise ValueError(
                f"an adapter for {len(manifest.blocks)} blocks of revision {manifest.revision}, the model has"
                f" {self.info.blocks} of revision {self.info.revision}"
            )
        if manifest.virtual_tokens > (most := self.limits.max_adapter_virtual_tokens):
            raise ValueError(f"a prefix of {manifest.virtual_tokens} virtual tokens, {most} are allowed")
        if not any(content.blobs):
            return None
        if content.id not in self._sound:
            check_values(content)
            self._sound[content.id] = None
            if len(self._sound) > MAX_REMEMBERED:
                self._sound.popitem(last=False)
        return AdapterUse(content.id, content, self)

    def is_held(self, peer: PeerId, adapter: str, blocks: Blocks) -> bool:
        """Whether a server should have an adapter for these blocks."""
        held, until = self._held.get((peer, adapter), (frozenset[int](), 0.0))
        return held.issuperset(range(*blocks)) and trio.current_time() < until

    async def bring(self, peer: PeerId, content: AdapterContent, spec: SpanSpec) -> None:
        """Have a server hold an adapter for the blocks of `spec`, unless it should have it.

        Raises PeerFault, Refused.
        """
        with self._turn(peer, content.id) as lock:
            async with lock:
                if self.is_held(peer, content.id, spec.blocks):
                    return
                stream = await self.open_stream(peer)
                try:
                    held = await offer(stream, content, replace(spec, adapter=content.id), self.limits)
                except BaseException:
                    await stream.reset()
                    raise
                await stream.aclose()
                self._remember(peer, content.id, spec.blocks, held.seconds)

    def forget(self, peer: PeerId, adapter: str) -> None:
        """A server says that it does not hold an adapter."""
        self._held.pop((peer, adapter), None)

    def _remember(self, peer: PeerId, adapter: str, blocks: Blocks, seconds: float) -> None:
        before, until = self._held.pop((peer, adapter), (frozenset[int](), 0.0))
        if trio.current_time() >= until:
            before = frozenset()
        self._held[peer, adapter] = (
            before.union(range(*blocks)),
            trio.current_time() + seconds - MARGIN_SECONDS,
        )
        if len(self._held) > MAX_REMEMBERED:
            self._held.popitem(last=False)

    @contextmanager
    def _turn(self, peer: PeerId, adapter: str) -> Iterator[trio.Lock]:
        """One upload of an adapter to a server at a time: a second one has nothing left to do."""
        lock = self._under_way.setdefault((peer, adapter), trio.Lock())
        try:
            yield lock
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._under_way.pop((peer, adapter), None)


def kept_name(name: str, records: Iterable[Record], revision: str) -> str:
    """The full name, name#digits, of an adapter that servers keep, where they announce it.

    Operators may give one name to several adapters, and a chain must not mix them: the one that most blocks
    of servers have, then the first by its digits.
    """
    blocks = Counter[str]()
    for record in records:
        if record.revision == revision:
            for each in record.adapters:
                if name in (each, each.partition("#")[0]):
                    blocks[each] += record.stop - record.start
    return min(blocks, key=lambda each: (-blocks[each], each), default=name)


class Needs(NamedTuple):
    """What every server of a chain must take: deep prompts; an adapter, or None."""

    prompts: bool = False
    adapter: AdapterUse | None = None

    def within(self, constraints: Constraints) -> Constraints:
        """These constraints and the needs."""
        if self.adapter is not None:
            constraints = self.adapter.within(constraints)
        return replace(constraints, prompts=True) if self.prompts else constraints


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """The adapter of a session or a call.

    name: by which servers are asked for it.  content: what is brought to them; None: an adapter of the
    servers' operators.
    """

    name: str
    content: AdapterContent | None
    uploads: AdapterUploads

    @property
    def virtual_tokens(self) -> int:
        """Places of a cache in front of the text; a session's positions do not count them."""
        return 0 if self.content is None else self.content.manifest.virtual_tokens

    def within(self, constraints: Constraints) -> Constraints:
        """These constraints, and that every server can compute with the adapter."""
        if self.content is None:
            return replace(constraints, adapter=self.name)
        sites = (site for block in self.content.manifest.blocks for site in block)
        return replace(constraints, lora=max((site.rank for site in sites), default=1))  # 1: of a prefix

    def seconds_for(self, peer: PeerId, blocks: Blocks) -> float:
        """Time to bring the adapter to a server, a part of a hop's opening; 0 where it should be there."""
        content, limits = self.content, self.uploads.limits
        if content is None or self.uploads.is_held(peer, self.name, blocks):
            return 0.0
        size = sum(len(content.blobs[block]) for block in range(*blocks))
        return limits.frame_start_seconds + size / limits.frame_floor_bytes_per_second

    async def bring(self, peer: PeerId, spec: SpanSpec) -> None:
        """Have a server hold the adapter for the blocks of `spec`.  Raises PeerFault, Refused."""
        if self.content is not None and not self.uploads.is_held(peer, self.name, spec.blocks):
            await self.uploads.bring(peer, self.content, spec)

    def forget(self, peer: PeerId) -> bool:
        """A server says that it does not hold the adapter; whether it can be brought again."""
        self.uploads.forget(peer, self.name)
        return self.content is not None
