"""`status --ask`: servers say their state of this moment, and a server that does not costs its deadline."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from node.monitor.status import ASK_SECONDS, ask_servers, tables
from node.network.peer_info import ask_for_info
from node.network.streams import FramedStream
from routing.names import PeerId
from routing.view.description import describe
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tensor_codec.errors import PeerGone
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.info import PeerInfo, decode_describe, encode_info
from tests.fakes import memory_framed_pair

INFO = PeerInfo(
    "online", "m", "r", 6, 0, 3, "float32", "none", 2, 64, 96, 16, 96, 2048, 1.5, 0.01, 0.001, "n", "0", 8
)


def facts(*names: str) -> dict[str, Any]:
    """What the records say: each server has 96 tokens free and no queue."""
    records = [
        Record(
            peer=PeerId(name), role="serve", model="m", revision="r", blocks=6, start=0, stop=3,
            seconds_per_block=0.01, cache_tokens=96,
        )
        for name in names
    ]  # fmt: skip
    entries = {record.peer: Entry(record, b"", 0.0) for record in records}
    found: dict[str, Any] = json.loads(json.dumps(describe(SwarmView("public", entries=entries), {})))
    return found


async def test_what_servers_say_takes_the_place_of_their_records(autojump_clock: object) -> None:
    found = facts("answers", "refuses", "silent", "unreachable")
    async with trio.open_nursery() as nursery:

        async def serve(stream: FramedStream, peer: str) -> None:
            frame = await stream.receive()
            assert frame is not None
            decode_describe(frame)
            if peer == "silent":
                await trio.sleep_forever()
            failed = Failed("draining", "loading", 2.0)
            await stream.send(encode_info(INFO) if peer == "answers" else encode_failed(failed))

        async def open_stream(peer: PeerId) -> FramedStream:
            await trio.lowlevel.checkpoint()
            if peer == "unreachable":
                raise PeerGone("nobody there")
            ours, theirs = memory_framed_pair()
            nursery.start_soon(serve, theirs, peer)
            return ours

        began = trio.current_time()
        await ask_servers(open_stream, found["peers"])
        assert trio.current_time() - began <= ASK_SECONDS
        nursery.cancel_scope.cancel()
    keys = ("sessions", "threads", "free_cache_tokens", "queue")
    said = {peer["peer"]: tuple(peer[key] for key in keys) for peer in found["peers"]}
    assert said.pop("answers") == (2, 8, 64, 1.5)
    assert said == dict.fromkeys(("refuses", "silent", "unreachable"), (None, None, 96, 0.0))
    asked: Any = tables(found)[0]
    for column, header, said_by_one in zip(asked.columns[-2:], ("sessions", "threads"), "28", strict=True):
        assert column.header == header
        assert sorted(column.cells) == ["", "", "", said_by_one]
    unasked: Any = tables(facts("answers"))[0]
    assert "sessions" not in [column.header for column in unasked.columns]


async def test_a_stream_that_ends_instead_of_an_answer_is_a_peer_that_has_gone(
    autojump_clock: object,
) -> None:
    ours, theirs = memory_framed_pair()
    await theirs.send_eof()
    with pytest.raises(PeerGone, match="closed instead of an answer"):
        await ask_for_info(ours, 5.0)
