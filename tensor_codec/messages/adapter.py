"""Messages by which a client brings an adapter to a server: what it has, what the server lacks, the bytes.

    client -> server   offer
    server -> client   need, held or failed
    client -> server   block ..., after a need
    server -> client   held or failed
    client -> server   drop, in place of an offer

One offer after the other may go over a stream.  An adapter is known by its id, a hash over its manifest and
over the digests of its blobs; the server verifies it before it takes a byte of a blob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensor_codec.adapters import AdapterManifest, adapter_id, decode_manifest, encode_manifest, is_adapter_id
from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header
from tensor_codec.limits import MIB, Limits
from tensor_codec.messages.contract import HEADER_BYTES
from tensor_codec.messages.fields import Failed, Message, no_body, read_failed, read_message, read_spec
from tensor_codec.span_spec import SpanSpec

ADAPTER_PROTOCOL = "/raceme/adapter/1"  # a client and a server
DIGEST_BYTES = 32
PIECE_BYTES = 8 * MIB  # of a blob in one message: half of a frame
MAX_BLOB_BYTES = 1 << 40
MAX_KEPT_SECONDS = 86_400.0
_OFFERS = frozenset({"offer", "drop"})


@dataclass(frozen=True, slots=True)
class Offer:
    """Says that the sender has an adapter, and wants it held for the blocks of `spec`.

    spec: its `adapter` is the id.  digests: SHA-256 of every block's blob, 32 bytes each.
    """

    spec: SpanSpec
    manifest: AdapterManifest
    digests: tuple[bytes, ...]

    @property
    def name(self) -> str:
        """The id."""
        assert self.spec.adapter is not None
        return self.spec.adapter


@dataclass(frozen=True, slots=True)
class OfferFrame:
    """An Offer as it came: `checked` makes it one.

    manifest: msgpack.  digests: all of them in one.
    """

    spec: SpanSpec
    manifest: Buffer
    digests: Buffer

    @property
    def name(self) -> str:
        """The id, as it was said."""
        assert self.spec.adapter is not None
        return self.spec.adapter

    def checked(self, limits: Limits, blocks: int) -> Offer:
        """The offer; its id is that of the manifest and the digests.  blocks: of the model.

        Raises MessageError.
        """
        manifest = decode_manifest(self.manifest, limits)
        if len(manifest.blocks) != blocks:  # before the hash, which takes as long as there are blocks
            raise MessageError(f"an adapter of {len(manifest.blocks)} blocks, {blocks} are needed")
        size = DIGEST_BYTES
        if len(self.digests) != size * len(manifest.blocks):
            raise MessageError(
                f"{len(self.digests)} bytes of digests for {len(manifest.blocks)} blocks, {size} each are"
                " needed"
            )
        data = bytes(self.digests)
        digests = tuple(data[at : at + size] for at in range(0, len(data), size))
        if manifest.revision != self.spec.revision:
            raise MessageError(f"an adapter of revision {manifest.revision} for {self.spec.revision}")
        found = adapter_id(manifest, digests)
        if found != self.spec.adapter:
            raise MessageError(f"an adapter is offered as {self.spec.adapter}, its content is {found}")
        return Offer(self.spec, manifest, digests)


@dataclass(frozen=True, slots=True)
class Need:
    """The answer to an Offer: the blobs of these blocks are to be sent, in this order.

    room: bytes that the sender may have held here, these included.
    """

    blocks: tuple[int, ...]
    room: int


@dataclass(frozen=True, slots=True)
class BlobPart:
    """A part of a block's blob, from byte `at` on, at most PIECE_BYTES long."""

    block: int
    at: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """Sessions and requests of the sender may name the adapter.  seconds: it is kept so long without use."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Drop:
    """The sender has no more use for an adapter, known by its id.  No answer comes."""

    adapter: str


def offer_bytes(limits: Limits, blocks: int) -> int:
    """The longest frame of an Offer for a model of so many blocks."""
    return HEADER_BYTES + limits.max_adapter_manifest_bytes + DIGEST_BYTES * blocks


def encode_offer(message: Offer) -> list[Buffer]:
    """The parts of a frame."""
    spec, manifest = message.spec, encode_manifest(message.manifest)
    fields: dict[str, object] = {
        "k": "offer",
        "model": spec.model,
        "revision": spec.revision,
        "start": spec.blocks.start,
        "stop": spec.blocks.stop,
        "dtype": spec.dtype,
        "adapter": spec.adapter,
        "manifest": len(manifest),
    }
    return [pack_header(fields), manifest, *message.digests]


def encode_drop(message: Drop) -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "drop", "adapter": message.adapter})]


def encode_blob_part(message: BlobPart) -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "block", "b": message.block, "at": message.at}), message.data]


def encode_need(message: Need, run: Blocks) -> list[Buffer]:
    """The parts of a frame.  run: the blocks of the offer."""
    marks = bytearray((run.size + 7) // 8)
    for block in message.blocks:
        place = block - run.start
        marks[place // 8] |= 1 << place % 8
    return [pack_header({"k": "need", "blocks": bytes(marks), "room": message.room})]


def encode_held(message: HeldAdapter) -> list[Buffer]:
    """The parts of a frame."""
    return [pack_header({"k": "held", "seconds": message.seconds})]


def decode_offer(frame: Buffer) -> OfferFrame | Drop:
    """Read what begins an exchange.  Raises MessageError."""
    message = read_message(frame, _OFFERS)
    header = message.header
    if message.kind == "drop":
        no_body(message)
        return Drop(_adapter(header))
    size = header.integer("manifest", 1, len(message.body))
    spec = read_spec(header)
    _adapter(header)
    digests = message.body[size:]
    if len(digests) % DIGEST_BYTES or not 0 < len(digests) // DIGEST_BYTES <= MAX_BLOCKS:
        raise MessageError(f"{len(digests)} bytes of digests, {DIGEST_BYTES} for each block are allowed")
    return OfferFrame(spec, message.body[:size], digests)


def decode_blob_part(frame: Buffer, rest: int) -> BlobPart:
    """Read a part of a blob of which `rest` bytes are still to come.  Raises MessageError."""
    message = read_message(frame, frozenset({"block"}))
    most = min(rest, PIECE_BYTES)
    if not 0 < len(message.body) <= most:
        raise MessageError(f"{len(message.body)} bytes of a blob, 1..{most} are allowed now")
    header = message.header
    return BlobPart(
        header.integer("b", 0, MAX_BLOCKS - 1), header.integer("at", 0, MAX_BLOB_BYTES), message.body
    )


def decode_need_or_held(frame: Buffer, run: Blocks) -> Need | HeldAdapter | Failed:
    """Read the answer to an Offer for the blocks of `run`.  Raises MessageError."""
    message = read_message(frame, frozenset({"need", "held", "failed"}))
    if message.kind == "need":
        return _need(message, run)
    return _read_held(message)


def decode_held(frame: Buffer) -> HeldAdapter | Failed:
    """Read the answer to the last part of the last blob.  Raises MessageError."""
    return _read_held(read_message(frame, frozenset({"held", "failed"})))


def _read_held(message: Message) -> HeldAdapter | Failed:
    if message.kind == "failed":
        return read_failed(message)
    no_body(message)
    return HeldAdapter(message.header.number("seconds", 0.0, MAX_KEPT_SECONDS))


def _need(message: Message, run: Blocks) -> Need:
    no_body(message)
    marks = message.header.binary("blocks", (run.size + 7) // 8)
    places = [place for place in range(8 * len(marks)) if marks[place // 8] >> place % 8 & 1]
    if not places or places[-1] >= run.size:
        raise MessageError(f"an adapter is needed for no block, or for others than {run}")
    blocks = tuple(run.start + place for place in places)
    return Need(blocks, message.header.integer("room", 0, MAX_BLOB_BYTES))


def _adapter(header: Header) -> str:
    name = header.text("adapter")
    if not is_adapter_id(name):
        raise MessageError("adapter is no id: 64 hexadecimal digits are allowed")
    return name


def pieces(block: int, blob: Buffer) -> Sequence[BlobPart]:
    """A block's blob in messages; none for an empty one."""
    view = memoryview(blob)
    return [BlobPart(block, at, view[at : at + PIECE_BYTES]) for at in range(0, len(view), PIECE_BYTES)]
