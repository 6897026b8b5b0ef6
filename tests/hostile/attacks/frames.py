"""Attacks with frames: announced and not finished, many, or with a header that explodes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial

import msgpack
import trio

from node.network.directory.neighbours import PROTOCOL as RECORDS_PROTOCOL
from node.network.host import PING_PROTOCOL
from node.network.transport.connection import MuxedStream
from node.network.transport.identity import identity_of
from routing.view.exchange import encode_digest
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.frame import encode_frame
from tensor_codec.limits import KIB, MIB
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL
from tensor_codec.messages.session import PUSH_PROTOCOL, SESSION_PROTOCOL
from tests.hostile.means import connection_to, framed, stream_of
from tests.hostile.stage import Stage

GIANTS, GIANT_STREAMS = 4, 60
GIANT = 16 * MIB - 1
PIECE = bytes(64 * KIB)
DIGESTERS, BOMBERS = 4, 4


async def giant_frames(stage: Stage) -> None:
    """4 ids x 60 push streams, each with a frame of 16 MiB - 1 that never ends."""
    await giants(stage, [PUSH_PROTOCOL])


async def giant_first_frames(stage: Stage) -> None:
    """The same where nothing but a small first message may come: sessions, pings, records."""
    await giants(stage, [SESSION_PROTOCOL, PING_PROTOCOL, RECORDS_PROTOCOL])


async def many_frames(stage: Stage) -> None:
    """4 ids that ask for the node's digest of records at full speed."""
    identities = [identity_of(bytes([number]) * 32) for number in range(1, DIGESTERS + 1)]
    frames = b"".join(encode_frame(frame) for frame in encode_digest({}, ask=True)) * 100
    await stage.ready()

    async def ask() -> None:
        async with connection_to(stage, identities.pop()) as connection, trio.open_nursery() as nursery:
            stream = stream_of(connection, RECORDS_PROTOCOL)
            nursery.start_soon(forget_answers, stream)
            while True:
                await stream.send_all(frames)
                stage.got["frames"] += 100

    await stage.at_once(DIGESTERS, ask)


async def header_bombs(stage: Stage) -> None:
    """Headers that become large or deep when they are unpacked, on every protocol."""
    await stage.ready()
    protocols = [SESSION_PROTOCOL, PUSH_PROTOCOL, RECORDS_PROTOCOL, COMPUTE_PROTOCOL, PING_PROTOCOL]

    async def bomb() -> None:
        async with connection_to(stage) as connection:
            for header in bombs():
                for protocol in protocols:
                    stream = framed(connection, protocol)
                    try:
                        await stream.send(struct.pack(">H", len(header) & 0xFFFF) + header)
                        await stream.receive(1.0)
                    except PeerFault:
                        stage.got["refused"] += 1
                    finally:
                        await stream.aclose()
                    stage.got["bombs"] += 1
                    await trio.sleep(0.05)  # within the rate of streams

    await stage.at_once(BOMBERS, bomb)


def bombs() -> Sequence[bytes]:
    """Headers of at most 4 KiB, and a few that say they are longer."""
    empty = 4000
    return [
        b"\xdd" + struct.pack(">I", 2**32 - 1),  # an array of four thousand million items
        b"\xdf" + struct.pack(">I", 2**32 - 1),
        b"\xdc" + struct.pack(">H", empty) + b"\x80" * empty,  # empty maps
        b"\x91" * empty + b"\xc0",  # depth
        b"\x81\xa1k" * 1300 + b"\xc0",
        b"\xc7\x10\x01" + bytes(16),  # extension types
        b"\xc6" + struct.pack(">I", 2**32 - 1),
        b"\x82\xa1k\xa4step\xa1k\xa4open",  # a key twice
        b"\x81\x01\x02",
        b"\x81\xa1k\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"\x81\xa1k\xa2\xff\xfe",
        bytes(msgpack.packb({"k": "step", "s": b"x" * 16, "n": 2**63, "p": 0, "r": 0})),
        b"\x00" * (60 * KIB),
    ]


async def giants(stage: Stage, protocols: Sequence[str]) -> None:
    """Ids with streams that each announce a giant frame and send of it what they can."""
    await stage.ready()

    async def one_id() -> None:
        async with connection_to(stage) as connection, trio.open_nursery() as nursery:
            for number in range(GIANT_STREAMS):
                stream = stream_of(connection, protocols[number % len(protocols)])
                nursery.start_soon(partial(fill, stage, stream))
            await connection.closed.wait()
            raise PeerGone(connection.failure or "closed")

    await stage.at_once(GIANTS, one_id)


async def fill(stage: Stage, stream: MuxedStream) -> None:
    """Send a giant frame but for its last byte; slower near the end, so that it stays."""
    try:
        await stream.send_all(GIANT.to_bytes(4, "big"))
        for _ in range(GIANT // len(PIECE)):
            await stream.send_all(PIECE)
            stage.got["bytes"] += len(PIECE)
        await trio.sleep_forever()
    except PeerFault:
        stage.got["streams refused"] += 1


async def forget_answers(stream: MuxedStream) -> None:
    """Take what comes, and drop it."""
    while await stream.receive_some():
        pass
    raise PeerGone("the stream was closed")
