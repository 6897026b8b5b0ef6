"""Messages by which adapters are shared: cards in pages, an adapter's manifest, its blobs.

    any node -> seeder     cards, manifest or blobs
    seeder -> any node     page; content; block ...; or failed

One question after the other may go over a stream of ADAPTER_PROTOCOL.  Cards travel as their authors signed
them.  A manifest comes with the hash of every blob, and the id is a hash of both: content with another id is
dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tensor_codec.adapters import AdapterManifest, adapter_id, decode_manifest, encode_manifest, is_adapter_id
from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import Header, pack_header, split_message
from tensor_codec.limits import KIB, Limits
from tensor_codec.messages.adapter import DIGEST_BYTES, BlobPart, decode_blob_part
from tensor_codec.messages.fields import Failed, Message, no_body, read_failed, read_message

QUESTIONS = frozenset({"cards", "manifest", "blobs"})
SHARED_PIECE_BYTES = 120 * KIB  # of a blob in one message: below the size of frames that need a place
_LENGTH_BYTES = 2


@dataclass(frozen=True, slots=True)
class AskCards:
    """Asks for cards of adapters for a model's revision, by their ids.  after: those behind this id."""

    revision: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class AskManifest:
    """Asks for the manifest of an adapter, by its id."""

    adapter: str


@dataclass(frozen=True, slots=True)
class AskBlobs:
    """Asks for the blobs of an adapter, by its id, for these blocks one after the other."""

    adapter: str
    blocks: Blocks


Question = AskCards | AskManifest | AskBlobs


@dataclass(frozen=True, slots=True)
class CardsPage:
    """Signed cards.  has_more: there are others behind the last one."""

    cards: tuple[bytes, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class SharedManifest:
    """The manifest of an adapter, and SHA-256 of the blob of every block, 32 bytes each."""

    manifest: AdapterManifest
    digests: tuple[bytes, ...]


def encode_question(message: Question) -> list[Buffer]:
    """The parts of a frame."""
    match message:
        case AskCards(revision, after):
            fields: dict[str, object] = {"k": "cards", "revision": revision}
            return [pack_header(fields | ({"after": after} if after else {}))]
        case AskManifest(adapter):
            return [pack_header({"k": "manifest", "adapter": adapter})]
        case AskBlobs(adapter, blocks):
            asked = {"k": "blobs", "adapter": adapter, "start": blocks.start, "stop": blocks.stop}
            return [pack_header(asked)]


def is_question(frame: Buffer) -> bool:
    """Whether a frame is a question of this module, by its kind.  Raises MessageError for no message."""
    header, _ = split_message(frame)
    with suppress(MessageError):
        return bool(header.choice("k", QUESTIONS))
    return False


def decode_question(frame: Buffer) -> Question:
    """Read a question of one who looks for adapters.  Raises MessageError."""
    message = read_message(frame, QUESTIONS)
    no_body(message)
    header = message.header
    if message.kind == "cards":
        return AskCards(header.text("revision", 128), _id(header, "after") if "after" in header else "")
    adapter = _id(header, "adapter")
    if message.kind == "manifest":
        return AskManifest(adapter)
    start = header.integer("start", 0, MAX_BLOCKS - 1)
    return AskBlobs(adapter, Blocks(start, header.integer("stop", start + 1, MAX_BLOCKS)))


def encode_page(page: CardsPage) -> list[Buffer]:
    """The parts of a frame."""
    body = (part for card in page.cards for part in (len(card).to_bytes(_LENGTH_BYTES, "big"), card))
    return [pack_header({"k": "page", "more": page.has_more}), *body]


def decode_page(frame: Buffer, limits: Limits) -> CardsPage | Failed:
    """Read the answer to AskCards; the cards themselves are still to be checked.  Raises MessageError."""
    message = read_message(frame, frozenset({"page", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    cards = tuple(_cards(message, limits))
    has_more = message.header.flag("more")
    if has_more and not cards:
        raise MessageError("a page without a card, and more to come")
    return CardsPage(cards, has_more)


def encode_content(manifest: AdapterManifest, digests: Sequence[bytes]) -> list[Buffer]:
    """The parts of a frame."""
    packed = encode_manifest(manifest)
    return [pack_header({"k": "content", "manifest": len(packed)}), packed, *digests]


def decode_content(frame: Buffer, adapter: str, limits: Limits) -> SharedManifest | Failed:
    """Read the answer to AskManifest: the content of this id.  Raises MessageError for any other."""
    message = read_message(frame, frozenset({"content", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    size = message.header.integer("manifest", 1, len(message.body))
    manifest = decode_manifest(message.body[:size], limits)
    data, blocks = bytes(message.body[size:]), len(manifest.blocks)
    if len(data) != DIGEST_BYTES * blocks:
        raise MessageError(f"{len(data)} bytes of hashes for {blocks} blocks, {DIGEST_BYTES} each are needed")
    digests = tuple(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES))
    if (found := adapter_id(manifest, digests)) != adapter:
        raise MessageError(f"adapter {adapter} was asked for, {found} came")
    return SharedManifest(manifest, digests)


def decode_shared_part(frame: Buffer, rest: int) -> BlobPart | Failed:
    """Read a part of a blob of which `rest` bytes are still to come.  Raises MessageError."""
    message = read_message(frame, frozenset({"block", "failed"}))
    if message.kind == "failed":
        return read_failed(message)
    return decode_blob_part(frame, rest)


def shared_pieces(block: int, blob: Buffer) -> Iterator[BlobPart]:
    """A block's blob in messages; none for an empty one."""
    view = memoryview(blob)
    for at in range(0, len(view), SHARED_PIECE_BYTES):
        yield BlobPart(block, at, view[at : at + SHARED_PIECE_BYTES])


def _cards(message: Message, limits: Limits) -> Iterator[bytes]:
    """The cards in a page's body.  Raises MessageError."""
    body, at, count = message.body, 0, 0
    while at < len(body):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(body[at:begin], "big")
        count += 1
        if count > limits.max_adapter_cards_per_page:
            raise MessageError(f"more than {limits.max_adapter_cards_per_page} cards in a page")
        if not 0 < at - begin <= limits.max_adapter_card_bytes:
            raise MessageError(f"a card of {at - begin} bytes, {limits.max_adapter_card_bytes} are allowed")
        if at > len(body):
            raise MessageError("a page ends in the middle of a card")
        yield bytes(body[begin:at])


def _id(header: Header, name: str) -> str:
    text = header.text(name)
    if not is_adapter_id(text):
        raise MessageError(f"{name} is no id: 64 hexadecimal digits are allowed")
    return text
