"""Lies of a serving peer towards a client: it is chosen for its rates, and then does not serve."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from node.network.directory.directory import DirectoryConfig, open_directory
from node.network.host import Host, open_host
from node.network.streams import FramedStream
from node.network.transport.connection import MuxedStream
from tensor_codec.frame import encode_frame
from tensor_codec.messages.fields import Failed, encode_failed, read_message
from tensor_codec.messages.info import PeerInfo
from tensor_codec.messages.session import (
    SESSION_PROTOCOL,
    Here,
    Open,
    Opened,
    Result,
    decode_open,
    encode_here,
    encode_opened,
    encode_result,
)
from tests.hostile.attacks.directory import server_record
from tests.hostile.stage import Stage, new_identity, served_by

Lie = Callable[[Stage, FramedStream, Open], Awaitable[None]]
KINDS = frozenset({"step", "close", "relink", "resume", "where"})
SLOW_SECONDS = 0.15  # for each step, by a peer that claims to be the fastest
ANNOUNCE_SECONDS = 5.0


async def lie_frame(stage: Stage) -> None:
    """A hop that answers each step with a fault of the next hop, which is honest."""
    await serve(stage, frame_the_next)


async def lie_stall(stage: Stage) -> None:
    """A hop that takes steps, says it gets on when it is asked, and never answers."""
    await serve(stage, stall)


async def lie_garbage(stage: Stage) -> None:
    """A hop whose results have no shape that was agreed on."""
    await serve(stage, garbage)


async def lie_drip(stage: Stage) -> None:
    """A hop that sends its results a byte a second."""
    await serve(stage, drip)


async def lie_refuse(stage: Stage) -> None:
    """A hop that takes every session and refuses each step for a moment."""
    await serve(stage, refuse)


async def lie_rates(stage: Stage) -> None:
    """A hop that claims to be the fastest and lets the honest server compute, much later."""
    info = await served_by(stage.target)
    await stage_a_server(stage, info, partial(relay_late, stage), fastest=True)


async def serve(stage: Stage, lie: Lie) -> None:
    """A server that takes every session and then lies."""
    info = await served_by(stage.target)

    async def serve_session(stream: FramedStream) -> None:
        frame = await stream.receive(5.0)
        if frame is None:
            return
        stage.got["sessions taken"] += 1
        opened = decode_open(frame)
        await stream.send(encode_opened(Opened(push=opened.successor is not None)))
        await lie(stage, stream, opened)

    await stage_a_server(stage, info, lambda host, stream: serve_session(stream), fastest=False)


async def stage_a_server(
    stage: Stage,
    info: PeerInfo,
    serve_session: Callable[[Host, FramedStream], Awaitable[None]],
    *,
    fastest: bool,
) -> None:
    """Join the swarm as a server of the target's blocks."""
    identity = new_identity()
    async with open_host(identity=identity, listen=[f"/ip4/{stage.sources[0]}/tcp/0"]) as host:
        host.handle(SESSION_PROTOCOL, partial(serve_session, host))
        config = DirectoryConfig("public", (stage.target.address,), "serve", watch=False)
        async with open_directory(host, identity, config) as directory:
            await stage.ready()
            record = server_record(info, identity, host.addresses, (info.start, info.stop))
            if fastest:
                record = server_record(info, identity, host.addresses, (0, info.blocks))
            while True:
                await directory.announce(record)
                await trio.sleep(ANNOUNCE_SECONDS)


async def frame_the_next(stage: Stage, stream: FramedStream, opened: Open) -> None:
    """Every step is the next one's fault."""
    while (frame := await stream.receive()) is not None:
        message = read_message(frame, KINDS)
        if message.kind == "step":
            stage.got["steps"] += 1
            code = "bad_values" if stage.got["sessions taken"] % 2 else "cannot_push"
            number = message.header.integer("n", 0, 1 << 53)
            words = Failed(code, "it sent something that is no number", None, number, opened.successor)
            await stream.send(encode_failed(words))


async def stall(stage: Stage, stream: FramedStream, opened: Open) -> None:
    """Every question is answered with a little more progress."""
    asked = 0
    while (frame := await stream.receive()) is not None:
        message = read_message(frame, KINDS)
        stage.got[message.kind] += 1
        if message.kind == "where":
            asked += 1
            await stream.send(encode_here(Here(asked % opened.max_length, 1, None)))


async def garbage(stage: Stage, stream: FramedStream, opened: Open) -> None:
    """Every result is some bytes too short."""
    while (frame := await stream.receive()) is not None:
        message = read_message(frame, KINDS)
        if message.kind == "step":
            stage.got["steps"] += 1
            body = bytes(message.body)[:-3]
            await stream.send(encode_result(Result(message.header.integer("n", 0, 1 << 53), 0, body)))


async def drip(stage: Stage, stream: FramedStream, opened: Open) -> None:
    """Every result comes a byte a second."""
    while (frame := await stream.receive()) is not None:
        message = read_message(frame, KINDS)
        if message.kind == "step":
            stage.got["steps"] += 1
            number = message.header.integer("n", 0, 1 << 53)
            data = encode_frame(encode_result(Result(number, 0, bytes(message.body))))
            raw = raw_of(stream)
            for at in range(len(data)):
                await raw.send_all(data[at : at + 1])
                await trio.sleep(1.0)


async def refuse(stage: Stage, stream: FramedStream, opened: Open) -> None:
    """Every step is refused, and may be sent again at once."""
    while (frame := await stream.receive()) is not None:
        message = read_message(frame, KINDS)
        if message.kind == "step":
            stage.got["steps"] += 1
            number = message.header.integer("n", 0, 1 << 53)
            await stream.send(encode_failed(Failed("too_many", "not now", 0.0, number)))


async def relay_late(stage: Stage, host: Host, stream: FramedStream) -> None:
    """Pass everything on to the honest server, and its answers back, each step late."""
    stage.got["sessions taken"] += 1
    target = stage.target
    honest = await host.open_stream(target.peer, target.where, SESSION_PROTOCOL, seconds=5.0)

    async def there() -> None:
        while (frame := await stream.receive()) is not None:
            await trio.sleep(SLOW_SECONDS)
            await honest.send(bytes(frame))
        await honest.send_eof()

    async def back() -> None:
        while (frame := await honest.receive()) is not None:
            stage.got["answers"] += 1
            await stream.send(bytes(frame))
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there)
            nursery.start_soon(back)
    finally:
        await honest.aclose()


def raw_of(stream: FramedStream) -> MuxedStream:
    """The stream under the frames."""
    raw = stream._stream
    assert isinstance(raw, MuxedStream)
    return raw
