"""Answers questions for adapters that this node gives to others, on streams of ADAPTER_PROTOCOL.

Questions keep to a rate, and so do the bytes of blobs, which also need a place among few.  What is held for a
peer is one answer of at most 128 KiB: as much as a node's stated memory counts for a small frame of a stream.
What a seeder gives is checked by its receiver.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.network.sharing.downloads import AGAIN_SECONDS, Downloads
from node.network.sharing.seeds import Seed, Seeds
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.errors import Refused, SlowPeer, TooManyStreams
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import encode_blob_part
from tensor_codec.messages.contract import HEADER_BYTES
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.sharing import (
    AskBlobs,
    AskCards,
    AskManifest,
    Question,
    decode_question,
    encode_content,
    encode_page,
    shared_pieces,
)


class SeedStream(Protocol):
    """The part of `node.network.streams.FramedStream` that a seeder needs."""

    limit: int

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    @property
    def prefix(self) -> str:
        """The network prefix of the peer's address; "" where it has none."""

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """See `FramedStream.send`."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """See `FramedStream.receive`."""


@dataclass(slots=True)
class Seeder:
    """Gives the adapters of `seeds` to any peer.  sleep: trio's, another for tests."""

    seeds: Seeds
    limits: Limits
    sleep: Callable[[float], Awaitable[None]] = trio.sleep
    downloads: Downloads = field(init=False)

    def __post_init__(self) -> None:
        self.downloads = Downloads(self.limits)

    async def serve(self, stream: SeedStream) -> None:
        """Answer question after question until the peer ends the stream, or is silent.  Raises PeerFault."""
        stream.limit = HEADER_BYTES
        seconds, goes_on = self.limits.frame_start_seconds, True
        while goes_on:
            if (frame := await next_frame(stream, seconds)) is None:
                return
            seconds = self.limits.compute_idle_seconds
            goes_on = await self.answer(stream, decode_question(frame))

    async def answer(self, stream: SeedStream, question: Question) -> bool:
        """Answer one question; False where the stream is to end.  Raises PeerFault."""
        try:
            await self.sleep(self.downloads.asked(stream.peer, trio.current_time()))
        except TooManyStreams as refusal:
            await stream.send(encode_failed(Failed.of(refusal)))
            return False
        try:
            match question:
                case AskCards(revision, after):
                    page = self.seeds.page(revision, after, self.limits.max_adapter_cards_per_page)
                    await stream.send(encode_page(page))
                case AskManifest(adapter):
                    seed = self.seeds.get(adapter)
                    await stream.send(encode_content(seed.manifest, seed.digests))
                case AskBlobs(adapter, blocks):
                    await self._give(stream, self.seeds.get(adapter), blocks)
        except Refused as refusal:
            await stream.send(encode_failed(Failed.of(refusal)))
            return not isinstance(refusal, TooManyStreams)
        return True

    async def _give(self, stream: SeedStream, seed: Seed, blocks: Blocks) -> None:
        """Send the blobs of these blocks.  Raises Refused, PeerFault."""
        if blocks.stop > len(seed.blobs):
            raise Refused(f"blocks {blocks} were asked for, the adapter has {len(seed.blobs)}")
        size = sum(len(seed.blobs[block]) for block in range(*blocks))
        seconds = self.limits.adapter_upload_seconds + size / self.limits.frame_floor_bytes_per_second
        scope = trio.CancelScope()
        download = self.downloads.begin(stream.peer, stream.prefix, scope.cancel)
        try:
            with trio.move_on_after(seconds) as time, scope:
                for block in range(*blocks):
                    for part in shared_pieces(block, seed.blobs[block]):
                        now = trio.current_time()
                        size_now = len(part.data)
                        await self.sleep(self.downloads.pause(stream.prefix, size_now, now, stream.peer))
                        await stream.send(encode_blob_part(part))
        finally:
            self.downloads.finish(download)
        if time.cancelled_caught:
            raise SlowPeer(f"{stream.peer} has not taken {size} bytes of an adapter within {seconds:.3g} s")
        if scope.cancelled_caught:
            raise TooManyStreams("others want to download, your network has most", AGAIN_SECONDS)


async def next_frame(stream: SeedStream, seconds: float) -> Buffer | None:
    """The next frame; None at the end of the stream, or after `seconds` without a byte.  Raises PeerFault."""
    with trio.move_on_after(seconds):
        return await stream.receive()
    return await stream.receive() if stream.in_frame else None
