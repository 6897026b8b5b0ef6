"""Attacks with adapters: junk in the form of a guest's upload, from many ids at full speed."""

from __future__ import annotations

import itertools
import math
import secrets
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import trio

from tensor_codec.adapters import AdapterManifest, LoraSite, adapter_id, blob_digest
from tensor_codec.errors import PeerGone
from tensor_codec.messages.adapter import (
    ADAPTER_PROTOCOL,
    Need,
    Offer,
    decode_need_or_held,
    encode_blob_part,
    encode_offer,
    pieces,
)
from tests.hostile.means import connection_to, framed
from tests.hostile.stage import Stage, served_by, spec_of

GUESTS = 64
RANK, HIDDEN = 64, 576  # SmolLM2-135M
SITES = (LoraSite("q_proj", RANK, 1.0), LoraSite("o_proj", RANK, 1.0))
BLOB_VALUES = len(SITES) * RANK * 2 * HIDDEN


def blob_of(last: float) -> bytes:
    """A blob of zeros but for the last value."""
    return bytes(4 * BLOB_VALUES - 4) + struct.pack("<f", last)


async def junk_adapters(stage: Stage) -> None:
    """64 ids that upload adapters at full speed: other bytes than were hashed, NaN, and sound ones."""
    info = await served_by(stage.target)
    spec = spec_of(info)
    kinds = itertools.cycle(("other bytes", "not a number", "sound"))
    manifest = AdapterManifest(info.revision, "fp32", (SITES,) * info.blocks)
    await stage.ready()

    blobs = {"other bytes": blob_of(1.0), "not a number": blob_of(math.nan), "sound": blob_of(0.0)}
    digests = {kind: blob_digest(blob) for kind, blob in blobs.items()}
    digests["other bytes"] = digests["sound"]

    async def upload() -> None:
        kind = next(kinds)
        # An attacker hashes nothing anew: any digest of the last block makes an id of the offer's own.
        own = (*(digests[kind],) * (info.blocks - 1), secrets.token_bytes(32))
        async with connection_to(stage) as connection:
            stream = framed(connection, ADAPTER_PROTOCOL)
            named = replace(spec, adapter=adapter_id(manifest, own))
            await stream.send(encode_offer(Offer(named, manifest, own)))
            stage.got["offers"] += 1
            frame = await stream.receive()
            if frame is None:
                raise PeerGone("no answer to an offer")
            answer = decode_need_or_held(frame, spec.blocks)
            if not isinstance(answer, Need):
                stage.got[f"answered: {type(answer).__name__}"] += 1
                await trio.sleep(0.1)
                return
            sent = blobs[kind]
            for block in answer.blocks:
                for part in pieces(block, sent):
                    await stream.send(encode_blob_part(part))
                    stage.got["blobs"] += 1
            await stream.receive()

    await stage.at_once(GUESTS, upload)


def blobs_sent(got: Mapping[str, Any]) -> list[str]:
    """Whether anything was attacked: a server that asks for no blob is not."""
    return [] if got.get("blobs") else ["the server asked for no blob"]
