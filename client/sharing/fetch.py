"""Fetches a shared adapter from its seeders: each blob is whole and has its hash, or is dropped.

A blob comes from one seeder alone, so it is known who sent a wrong one.  Blobs that are sound stay when a
seeder fails, and the next one is asked for the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from client.sharing.catalogue import ANSWER_SECONDS, SharedStream, Sharing, answer_of
from routing.names import PeerId
from routing.sharing.catalogue import Listed
from tensor_codec.adapters import AdapterContent, AdapterManifest
from tensor_codec.blocks import Blocks
from tensor_codec.errors import MessageError, PeerFault, PeerGone, Refused, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.sharing import (
    AskBlobs,
    AskManifest,
    SharedManifest,
    decode_content,
    decode_shared_part,
    encode_question,
)

log = logging.getLogger("raceme")

STALL_SECONDS = 15.0  # for the next part of a blob: a seeder may have others to serve
ROUNDS = 3  # over all seeders, where some had no place
PAUSE_SECONDS = 5.0  # the longest between two rounds
Sizes = Callable[[AdapterManifest], Sequence[int]]


@dataclass(slots=True)
class Fetch:
    """An adapter on its way.

    sizes_of: bytes of the blob of every block, by the model and not by a peer; it may raise ConfigError.

    Promises, checked by tests/io/test_fetch.py:
      * what is complete has the id of the card, and the card's revision, kind, ranks, sites and bytes;
      * nothing of a blob with another hash stays;
      * a seeder that stalls, drips or goes costs its deadline and no blob that has come.
    """

    wanted: Listed
    limits: Limits
    sizes_of: Sizes
    content: SharedManifest | None = None
    sizes: Sequence[int] = ()
    blobs: dict[int, bytes] = field(default_factory=dict)

    @property
    def missing(self) -> Blocks | None:
        """The run of blocks whose blobs are still to come; None where all are there."""
        first = next((block for block, _ in enumerate(self.sizes) if block not in self.blobs), None)
        return None if first is None else Blocks(first, len(self.sizes))

    async def take_from(self, stream: SharedStream) -> AdapterContent:
        """Take from one seeder what is missing.  Raises PeerFault, Refused."""
        seconds = self.limits.adapter_upload_seconds
        seconds += self.wanted.card.size / self.limits.frame_floor_bytes_per_second
        with trio.move_on_after(seconds):
            content = self.content or await self._manifest(stream)
            while (run := self.missing) is not None:
                await stream.send(encode_question(AskBlobs(self.wanted.card.id, run)))
                for block in range(*run):
                    self.blobs[block] = await self._blob(stream, content, block)
            return AdapterContent(content.manifest, tuple(self.blobs[at] for at in range(len(self.sizes))))
        raise SlowPeer(f"{stream.peer} did not give an adapter within {seconds:.3g} s")

    async def _manifest(self, stream: SharedStream) -> SharedManifest:
        card = self.wanted.card
        await stream.send(encode_question(AskManifest(card.id)))
        found = decode_content(await answer_of(stream, ANSWER_SECONDS), card.id, self.limits)
        if isinstance(found, Failed):
            raise found.error()
        card.check(found.manifest)
        sizes = self.sizes_of(found.manifest)
        if sum(sizes) != card.size:
            raise MessageError(f"the card of {card.full_name} says {card.size} bytes, it has {sum(sizes)}")
        self.content, self.sizes = found, sizes
        return found

    async def _blob(self, stream: SharedStream, content: SharedManifest, block: int) -> bytes:
        size, blob, digest = self.sizes[block], bytearray(), hashlib.sha256()
        while len(blob) < size:
            part = decode_shared_part(await answer_of(stream, STALL_SECONDS), size - len(blob))
            if isinstance(part, Failed):
                raise part.error()
            if (part.block, part.at) != (block, len(blob)):
                raise RemoteProtocolError(
                    f"byte {part.at} of block {part.block} came, {len(blob)} of block {block} was to come"
                )
            blob += part.data
            digest.update(part.data)
        if digest.digest() != content.digests[block]:
            raise MessageError(f"the blob of block {block} has another hash than the adapter's")
        return bytes(blob)


async def fetch(sharing: Sharing, wanted: Listed, sizes_of: Sizes) -> AdapterContent:
    """The content of a shared adapter, from whichever seeders give it.

    Raises PeerGone that names what each seeder did, and what `sizes_of` raises.
    """
    one, reasons = Fetch(wanted, sharing.limits, sizes_of), dict[PeerId, str]()
    seeders = await sharing.seeders(wanted)
    for _ in range(ROUNDS):
        waits = []
        for peer in list(seeders):
            try:
                async with sharing.stream(peer) as stream:
                    return await one.take_from(stream)
            except PeerFault as fault:
                seeders.remove(peer)
                reasons[peer] = str(fault)
            except Refused as refusal:
                reasons[peer] = str(refusal)
                if refusal.retry_after_seconds is None:
                    seeders.remove(peer)
                else:
                    waits.append(refusal.retry_after_seconds)
            log.info("%s does not give %s: %s", peer, wanted.card.full_name, reasons[peer])
        if not waits:
            break
        await trio.sleep(min(min(waits), PAUSE_SECONDS))
    said = "; ".join(f"{peer}: {reason}" for peer, reason in reasons.items())
    raise PeerGone(f"no peer gave {wanted.card.full_name}: {said or 'none is known'}")
