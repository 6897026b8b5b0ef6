"""The entry point of guests' adapters.

    /raceme/adapter/1   a client offers an adapter, sends the blobs that this node lacks, and may name it;
                        any peer asks for the cards and the content of the operator's own adapters

Everything that can be known from an offer is checked before memory is taken: model, blocks, sites, ranks,
sizes and the id.  Then each blob is compared with its hash, and its values are looked at.  A fault ends the
stream; nothing of a blob that is not sound is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import trio

from node.network.sharing.seeder import next_frame
from node.runtime.compute_thread import Runner
from node.runtime.faults import Faults
from node.serving.adapters.desk import AdapterDesk
from node.serving.adapters.store import Block, manifest_bytes
from node.serving.adapters.sums import Shapes
from node.serving.adapters.uploads import AGAIN_SECONDS, Upload
from node.serving.executor.out_of_memory import or_refused
from node.serving.forward_backward import PeekStream
from node.serving.span_admission import LEAVING, SpanAdmission
from tensor_codec.adapters import blob_bytes
from tensor_codec.errors import (
    Draining,
    ForgedContent,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
    TooManyStreams,
)
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import (
    PIECE_BYTES,
    Drop,
    HeldAdapter,
    Need,
    Offer,
    OfferFrame,
    decode_blob_part,
    decode_offer,
    encode_held,
    encode_need,
    offer_bytes,
)
from tensor_codec.messages.contract import HEADER_BYTES
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.sharing import decode_question, is_question


@dataclass(slots=True)
class AdapterListener:
    """Takes adapters for one span.

    admission: to the served span.  shapes: of each block of the span, see `blob_bytes`.
    faults: of peers, counted.  others_decode: whether a peer decodes now that is not of this prefix, or is
    not this peer where it has no prefix.
    """

    admission: SpanAdmission
    desk: AdapterDesk
    shapes: Callable[[], Shapes]
    compute: Runner
    limits: Limits
    faults: Faults
    others_decode: Callable[[str], bool] = field(default=lambda party: False)

    async def serve(self, stream: PeekStream) -> None:
        """Take offer after offer until the client ends the stream.  Raises PeerFault."""
        seconds = self.limits.frame_start_seconds
        goes_on = True
        while goes_on:
            stream.limit = offer_bytes(self.limits, self.desk.blocks)
            if (frame := await next_frame(stream, seconds)) is None:
                return
            seconds = self.limits.compute_idle_seconds
            if is_question(frame):
                goes_on = await self.desk.seeder.answer(stream, decode_question(frame))
                continue
            message = decode_offer(frame)
            if isinstance(message, Drop):
                self.desk.store.drop(stream.peer, message.adapter)
            else:
                goes_on = await self._paced(stream) and await self._answer(stream, message)

    async def _paced(self, stream: PeekStream) -> bool:
        """Wait until one more offer of the peer may be looked at; False where that takes too long."""
        try:
            await trio.sleep(self.desk.uploads.offered(stream.peer, trio.current_time()))
        except TooManyStreams as refusal:
            return await self._end(stream, refusal)
        return True

    async def _answer(self, stream: PeekStream, frame: OfferFrame) -> bool:
        """Take what is offered; False where the stream is to end.  Raises PeerFault."""
        try:
            offer, sizes = self._checked(frame)
            missing = self.desk.store.missing(stream.peer, frame.name, sizes)
            upload = self._begin(stream, offer, sum(sizes[block] for block in missing)) if missing else None
        except Refused as refusal:
            await stream.send(encode_failed(Failed.of(refusal)))
            return True
        except MessageError as fault:
            return await self._end(stream, fault)
        if upload is not None:
            try:
                await self._receive(stream, offer, upload, {block: sizes[block] for block in missing})
            except (MessageError, RemoteProtocolError, Refused) as fault:
                return await self._end(stream, fault)
        await stream.send(encode_held(HeldAdapter(self.limits.adapter_idle_seconds)))
        return True

    async def _end(self, stream: PeekStream, fault: PeerFault | Refused) -> bool:
        """Say why nothing more is read: a reset would overtake it."""
        if isinstance(fault, PeerFault):
            self.faults.add(stream.peer, fault)
        await stream.send(encode_failed(Failed.of(fault)))
        return False

    def _checked(self, frame: OfferFrame) -> tuple[Offer, dict[int, int]]:
        """An offer that fits the served span, and the bytes of each of its blocks.

        Raises Refused, MessageError.
        """
        self.admission.admits(replace(frame.spec, adapter=None))
        offer = frame.checked(self.limits, self.desk.blocks)
        manifest, blocks = offer.manifest, offer.spec.blocks
        shapes = self.shapes()
        try:
            sizes = {
                block: blob_bytes(manifest.parts(block), shapes[block], manifest.dtype)
                for block in range(*blocks)
            }
        except MessageError as unfit:  # an honest client may not know what can carry an adapter here
            raise Refused(str(unfit)) from None
        return offer, sizes

    def _begin(self, stream: PeekStream, offer: Offer, size: int) -> Upload:
        """A place and `size` bytes for an upload.  Raises Refused."""
        upload = self.desk.uploads.begin(stream.peer, stream.prefix)
        try:
            self.desk.store.reserve(
                stream.peer, stream.prefix, offer.name, offer.manifest, size, trio.current_time(),
                manifest_bytes(offer.manifest),
            )  # fmt: skip
        except Refused:
            self.desk.uploads.end(upload)
            raise
        return upload

    async def _receive(
        self, stream: PeekStream, offer: Offer, upload: Upload, sizes: Mapping[int, int]
    ) -> None:
        """Take the blobs of these blocks, of these sizes.  Raises PeerFault, TooManyStreams."""
        store, left = self.desk.store, sum(sizes.values())
        seconds = self.limits.adapter_upload_seconds + left / self.limits.frame_floor_bytes_per_second
        try:
            with trio.move_on_after(seconds) as time, upload.scope:
                need = Need(tuple(sizes), store.claims.room_of(stream.peer))
                await stream.send(encode_need(need, offer.spec.blocks))
                stream.limit = HEADER_BYTES + PIECE_BYTES
                for block, size in sizes.items():
                    # In one expression: the blob is not held while the next one comes.
                    kept = await self._read(offer, block, await self._blob(stream, offer, block, size))
                    store.add(stream.peer, offer.name, block, kept, size)
                    left -= size
            if time.cancelled_caught:
                raise SlowPeer(f"an adapter was not whole within {seconds:.3g} s, {left} bytes are missing")
            if upload.yields and left:
                raise TooManyStreams("others want to bring adapters, your network has most", AGAIN_SECONDS)
        finally:
            store.release(stream.peer, offer.name, left, trio.current_time())
            self.desk.uploads.end(upload)

    async def _blob(self, stream: PeekStream, offer: Offer, block: int, size: int) -> bytearray:
        """The blob of a block, as long and with the hash as was offered.  Raises PeerFault."""
        blob, digest = bytearray(), hashlib.sha256()
        while len(blob) < size:
            frame = await stream.receive()
            if frame is None:
                raise PeerGone(f"the stream ended, {size - len(blob)} bytes of block {block} are missing")
            part = decode_blob_part(frame, size - len(blob))
            if (part.block, part.at) != (block, len(blob)):
                raise RemoteProtocolError(
                    f"byte {part.at} of block {part.block} came, {len(blob)} of block {block} was to come"
                )
            blob += part.data
            digest.update(part.data)
            beside = self.others_decode(stream.prefix or stream.peer)
            if pause := self.desk.uploads.pause(len(part.data), trio.current_time(), beside_steps=beside):
                await trio.sleep(pause)
        if digest.digest() != offer.digests[block]:
            raise ForgedContent(f"the blob of block {block} has another hash than was offered")
        return blob

    async def _read(self, offer: Offer, block: int, blob: bytearray) -> Block:
        """What a blob adds to its block.  Raises MessageError, OutOfMemory."""
        sites, dtype = offer.manifest.parts(block), offer.manifest.dtype
        shapes = self.shapes()
        if block not in shapes:
            raise Draining(LEAVING)
        read = or_refused(self.desk.read, "an adapter", self.limits.memory_retry_seconds)
        return await self.compute.run(read, sites, shapes[block], dtype, blob)
