"""Attacks of clients: sessions that are held, asked or fed with junk, and the computing that they ask for."""

from __future__ import annotations

import secrets
import struct
from functools import partial

import trio

from node.network.streams import FramedStream
from node.network.transport.connection import Connection, MuxedStream
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.frame import encode_frame
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL, Backward, Run, encode_request
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    Open,
    Step,
    decode_open_reply,
    encode_open,
    encode_step,
    encode_where,
)
from tensor_codec.span_spec import SpanSpec
from tests.hostile.attacks.frames import forget_answers
from tests.hostile.means import PATIENT, connection_to, framed, stream_of
from tests.hostile.stage import Stage, opening, served_by, spec_of

IDS = 4
HELD_SESSIONS, HELD_TOKENS = 64, 2048
HIDDEN = 576  # SmolLM2-135M
BACKWARD_TOKENS, SPLIT_TOKENS, BACKWARD_STREAMS = 2048, 512, 4
PREFILLS, PREFILL_TOKENS = 8, 1024
BATCH = 200
ANSWER_SECONDS = 5.0


async def where_flood(stage: Stage) -> None:
    """4 ids with a session each, and `where` at full speed."""
    spec = spec_of(await served_by(stage.target))
    frames = encode_frame(encode_where()) * BATCH
    await stage.ready()

    async def ask() -> None:
        async with connection_to(stage) as connection:
            stream, raw = await session(stage, connection, opening(spec, 64))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take_frames, stream)
                while True:
                    await raw.send_all(frames)
                    stage.got["frames"] += BATCH

    await stage.at_once(IDS, ask)


async def unknown_steps(stage: Stage) -> None:
    """4 ids that push steps of sessions that do not exist, at full speed."""
    step = encode_step(Step(secrets.token_bytes(16), 0, 0, "none", bytes(4 * HIDDEN)))
    frames = encode_frame(step) * (BATCH // 10)
    await stage.ready()

    async def push() -> None:
        async with connection_to(stage) as connection:
            stream = stream_of(connection, PUSH_PROTOCOL)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forget_answers, stream)
                while True:
                    await stream.send_all(frames)
                    stage.got["frames"] += BATCH // 10

    await stage.at_once(IDS, push)


async def session_holding(stage: Stage) -> None:
    """4 ids that open 64 sessions of 2,048 positions each, and send a token now and then."""
    spec = spec_of(await served_by(stage.target))
    await stage.ready()

    async def hold() -> None:
        async with connection_to(stage) as connection, trio.open_nursery() as nursery:
            for _ in range(HELD_SESSIONS):
                nursery.start_soon(hold_one, stage, connection, opening(spec, HELD_TOKENS))
                await trio.sleep(0.05)
            await connection.closed.wait()
            raise PeerGone(connection.failure or "closed")

    await stage.at_once(IDS, hold)


async def greedy_prefills(stage: Stage) -> None:
    """4 ids with 8 prompts of 1,024 positions each, again and again."""
    spec = spec_of(await served_by(stage.target))
    prompt = struct.pack("<f", 0.1) * (PREFILL_TOKENS * HIDDEN)
    await stage.ready()

    async def prefill() -> None:
        async with connection_to(stage) as connection, trio.open_nursery() as nursery:
            for _ in range(PREFILLS):
                nursery.start_soon(partial(feed, stage, connection, spec, prompt, 256))
            await connection.closed.wait()
            raise PeerGone(connection.failure or "closed")

    await stage.at_once(IDS, prefill)


async def junk_uploads(stage: Stage) -> None:
    """4 ids that upload full steps whose last value is no number."""
    spec = spec_of(await served_by(stage.target))
    junk = bytes(4 * (PREFILL_TOKENS * HIDDEN - 1)) + b"\x00\x00\xc0\x7f"
    await stage.ready()

    async def upload() -> None:
        async with connection_to(stage) as connection:
            await feed(stage, connection, spec, junk, PREFILL_TOKENS)

    await stage.at_once(IDS, upload)


async def giant_backward(stage: Stage) -> None:
    """One id, four streams, each with a backward of 2,048 positions through all blocks."""
    await backwards(stage, BACKWARD_TOKENS)


async def many_backwards(stage: Stage) -> None:
    """The same with 512 positions each: as much as any client may ask for, without end."""
    await backwards(stage, SPLIT_TOKENS)


async def backwards(stage: Stage, tokens: int) -> None:
    """One id, four streams, each with one backward after the other."""
    spec = spec_of(await served_by(stage.target))
    half = bytes(4 * tokens * HIDDEN)
    frame = encode_request(Backward(Run(spec, 1, "fp32"), half, half))
    await stage.ready()

    async def ask_all() -> None:
        async with connection_to(stage) as connection, trio.open_nursery() as nursery:

            async def ask() -> None:
                stream = framed(connection, COMPUTE_PROTOCOL)
                await stream.send(frame)
                stage.got["requests"] += 1
                if await stream.receive() is None:
                    await trio.sleep(0.2)
                stage.got["answers"] += 1
                await stream.aclose()

            for _ in range(BACKWARD_STREAMS):
                nursery.start_soon(stage.again_and_again, ask)
            await connection.closed.wait()
            raise PeerGone(connection.failure or "closed")

    await stage.again_and_again(ask_all)


async def session(stage: Stage, connection: Connection, wanted: Open) -> tuple[FramedStream, MuxedStream]:
    """An open session: its stream, whole frames and raw.  Raises PeerFault where it is refused."""
    raw = stream_of(connection, SESSION_PROTOCOL)
    stream = FramedStream(raw, connection.peer, SESSION_PROTOCOL, PATIENT)
    await stream.send(encode_open(wanted))
    frame = await stream.receive(ANSWER_SECONDS)
    if frame is None:
        raise PeerGone("the stream was closed")
    reply = decode_open_reply(frame)
    if isinstance(reply, Failed):
        stage.got[f"refused: {reply.code}"] += 1
        await stream.aclose()
        raise PeerGone(reply.message)
    stage.got["sessions"] += 1
    return stream, raw


async def hold_one(stage: Stage, connection: Connection, wanted: Open) -> None:
    """One session that is kept alive by a token every few seconds."""
    try:
        stream, _ = await session(stage, connection, wanted)
        for position in range(wanted.max_length):
            step = Step(wanted.session, position, position, "none", bytes(4 * HIDDEN))
            await stream.send(encode_step(step))
            with trio.move_on_after(3.0):
                await stream.receive()
                await trio.sleep(3.0)
    except PeerFault:
        stage.got["sessions ended"] += 1


async def feed(stage: Stage, connection: Connection, spec: SpanSpec, body: bytes, chunk: int) -> None:
    """Session after session, each with these hidden states in chunks of so many positions."""
    size = chunk * 4 * HIDDEN
    while True:
        wanted = opening(spec, PREFILL_TOKENS)
        try:
            stream, _ = await session(stage, connection, wanted)
            for number, at in enumerate(range(0, len(body), size)):
                step = Step(wanted.session, number, number * chunk, "last", body[at : at + size])
                await stream.send(encode_step(step))
                if await stream.receive(30.0) is None:
                    break
                stage.got["steps answered"] += 1
            await stream.aclose()
        except PeerFault:
            stage.got["sessions ended"] += 1
            connection.raise_if_closed()
            await trio.sleep(0.1)


async def take_frames(stream: FramedStream) -> None:
    """Take answers and drop them."""
    while await stream.receive() is not None:
        pass
    raise PeerGone("the stream was closed")
