"""Recorded bytes of a release: every message, a record, and a session's dialogue with one hop.

    python -m tests.golden     writes tests/data/golden-VERSION.json of this version, once for each release

tests/io/test_golden.py reads the files of all releases: later versions understand the bytes of each, and say
the same.  A key that older peers can do without is in no file before the next release.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import trio
import trio.testing

from node.config import VERSION
from node.network.transport.identity import identity_of
from routing.view.records import Record, sign_record
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import encode_hidden
from tensor_codec.frame import Buffer, encode_frame
from tensor_codec.header import pack_header, split_message
from tensor_codec.messages import fields, forward_backward, info, session
from tensor_codec.messages.contract import Contract
from tensor_codec.span_spec import SpanSpec
from tests.fakes_serving import CLIENT, HIDDEN, swarm

DATA = Path(__file__).parent / "data"
KEY = bytes(range(32))
ID = bytes(range(16))
CONTRACT = Contract(ID, 0, 2, 1, 64, 4, "fp32", 64)
ROW = bytes(range(CONTRACT.row_bytes))
SPEC = SpanSpec("model", "revision", Blocks(0, 2), "float32")
RUN = forward_backward.Run(SPEC, 1, "fp32", prompts=1)
TIMES = ((120, 80), (70, 60))
MEASURED = "t"  # of a result: microseconds, another number each time


@dataclass(frozen=True)
class Golden:
    """A message.  parts: as this version sends it.  again: read, and sent anew."""

    parts: Iterable[Buffer]
    again: Callable[[bytes], Iterable[Buffer]]


def _from_client(frame: bytes) -> Iterable[Buffer]:
    match session.decode_from_client(frame, CONTRACT):
        case session.Step() as step:
            return session.encode_step(step)
        case session.Relink() as relink:
            return session.encode_relink(relink)
        case session.Resume() as resume:
            return session.encode_resume(resume)
        case session.Where():
            return session.encode_where()
        case session.Close():
            return session.encode_close()
    raise AssertionError(frame)


def _pushed(frame: bytes) -> Iterable[Buffer]:
    message = fields.read_message(frame, frozenset({"step"}))
    found, owner = session.step_session(message)
    assert found == ID
    return session.encode_step(replace(session.read_step(message, CONTRACT), owner=owner))


def _from_hop(frame: bytes) -> Iterable[Buffer]:
    match session.decode_from_hop(frame, CONTRACT):
        case session.Result() as result:
            return session.encode_result(result)
        case session.Relinked() as relinked:
            return session.encode_relinked(relinked)
        case session.Here() as here:
            return session.encode_here(here)
        case fields.Failed() as failed:
            return fields.encode_failed(failed)
    raise AssertionError(frame)


def _open(frame: bytes) -> Iterable[Buffer]:
    return session.encode_open(session.decode_open(frame))


def _opened(frame: bytes) -> Iterable[Buffer]:
    opened = session.decode_open_reply(frame)
    assert isinstance(opened, session.Opened)
    return session.encode_opened(opened)


def _request(frame: bytes) -> Iterable[Buffer]:
    return forward_backward.encode_request(forward_backward.decode_request(frame).divided(CONTRACT.hidden))


def _output(frame: bytes) -> Iterable[Buffer]:
    asked = forward_backward.request_contract(forward_backward.Forward(RUN, ROW), CONTRACT.hidden, 64)
    output = forward_backward.decode_output(frame, asked)
    assert isinstance(output, forward_backward.Output)
    return forward_backward.encode_output(output)


def _info(frame: bytes) -> Iterable[Buffer]:
    found = info.decode_info(frame)
    assert isinstance(found, info.PeerInfo)
    return info.encode_info(found)


def _describe(frame: bytes) -> Iterable[Buffer]:
    info.decode_describe(frame)
    return info.encode_describe()


def messages() -> dict[str, Golden]:
    """Every message of the present version, with its keys, by name."""
    opened = session.Open(ID, SPEC, 1, 64, "fp32", "before", "after", True, 1, True, 1, ROW + ROW)
    described = info.PeerInfo(
        "online", "model", "revision", 6, 0, 3, "float32", "none", 1, 64, 96, 16, 64, 32, 1.5, 1e-3, 1e-4,
        "name", "0",
    )  # fmt: skip
    relinked = session.Relinked(1, True, 5, 2, 3, True, "fp32", 4)
    relink = session.Relink(1, "before", "after", True, "fp32")
    forward = forward_backward.Forward(RUN, ROW, ROW + ROW)
    backward = forward_backward.Backward(RUN, ROW, ROW, ROW + ROW)
    step = session.Step(ID, 3, 5, "last", ROW, TIMES, 1, True, 9, (0,), ID[:8])
    return {
        "open": Golden(session.encode_open(opened), _open),
        "opened": Golden(session.encode_opened(session.Opened(True, True, 1.5, True)), _opened),
        "pushed step": Golden(session.encode_step(step), _pushed),
        "step": Golden(session.encode_step(session.Step(ID, 4, 6, "all", ROW)), _from_client),
        "relink": Golden(session.encode_relink(relink), _from_client),
        "resume": Golden(session.encode_resume(session.Resume(1, 5, 2, 5, 4)), _from_client),
        "where": Golden(session.encode_where(), _from_client),
        "close": Golden(session.encode_close(), _from_client),
        "result": Golden(session.encode_result(session.Result(3, 5, ROW, TIMES, 1, True, 9)), _from_hop),
        "relinked": Golden(session.encode_relinked(relinked), _from_hop),
        "here": Golden(session.encode_here(session.Here(5, 1, 3)), _from_hop),
        "failed": Golden(fields.encode_failed(fields.Failed("ended", "idle", 1.0, 3, "peer")), _from_hop),
        "forward": Golden(forward_backward.encode_request(forward), _request),
        "backward": Golden(forward_backward.encode_request(backward), _request),
        "output": Golden(forward_backward.encode_output(forward_backward.Output(ROW, TIMES[:1])), _output),
        "describe": Golden(info.encode_describe(), _describe),
        "info": Golden(info.encode_info(described), _info),
    }


def record() -> tuple[Record, bytes]:
    """A record, and its bytes."""
    made = Record(
        peer=identity_of(KEY).peer_id, addresses=("/ip4/192.0.2.7/tcp/31330",), role="serve", model="model",
        revision="revision", blocks=6, start=0, stop=3, next_start=3, next_stop=6, dtype="float32",
        seconds_per_block=1e-3, prefill_seconds_per_token=1e-4, cache_tokens=64, session_tokens=64,
        step_tokens=64, queue=1.5, seq=7, prompts=True, name="name", version="0.1.0",
    )  # fmt: skip
    return made, sign_record(made, KEY)


def asked() -> list[bytes]:
    """What a client says to one hop of four blocks: two steps, a change of the route, a third step."""
    spec = SpanSpec("m", "r", Blocks(0, 4), "float32")

    def step(number: int, position: int, tokens: int, epoch: int = 0) -> Sequence[Buffer]:
        values = torch.arange(position, position + tokens, dtype=torch.float32)
        hidden = values[None, :, None].expand(1, tokens, HIDDEN).contiguous()
        body = bytes(encode_hidden(hidden, "fp32"))
        return session.encode_step(session.Step(ID, number, position, "all", body, epoch=epoch))

    said = (
        session.encode_open(session.Open(ID, spec, 1, 64, "fp32")),
        step(0, 0, 5),
        step(1, 5, 1),
        session.encode_where(),
        session.encode_relink(session.Relink(1, None, None, False)),
        session.encode_resume(session.Resume(1, 4, 4, 4)),
        step(2, 4, 1, 1),
    )
    return [joined(each) for each in said]


async def answers(frames: Sequence[bytes]) -> list[bytes]:
    """What a hop of this version says to these frames, one answer after the other, without measured times."""
    found: list[bytes] = []
    async with swarm() as world:
        node = world.add("a", 0, 4)
        stream = await world.dial(CLIENT, node.peer, session.SESSION_PROTOCOL)
        for frame in frames:
            await stream.send(frame)
            if _kind(frame) == "resume":
                continue  # it has no answer
            answer = await stream.receive(30.0)
            assert answer is not None
            found.append(without_times(bytes(answer)))
        await stream.send(session.encode_close())
        await stream.aclose()
    return found


def joined(parts: Iterable[Buffer]) -> bytes:
    """The frame's payload."""
    return b"".join(map(bytes, parts))


def changed(frame: bytes, **keys: object) -> bytes:
    """The frame with other header fields."""
    header, body = split_message(frame)
    return pack_header(header._fields | keys) + bytes(body)


def without_times(frame: bytes) -> bytes:
    """The frame without what was measured."""
    header, body = split_message(frame)
    return pack_header({key: value for key, value in header._fields.items() if key != MEASURED}) + bytes(body)


def _kind(frame: bytes) -> object:
    return split_message(frame)[0]._fields["k"]


def main() -> int:
    """Write the file of this version.  1 where it is there already: a release does not change."""
    path = DATA / f"golden-{VERSION}.json"
    if path.exists():
        sys.stderr.write(f"{path} is there already\n")
        return 1
    frames = asked()
    said = trio.run(answers, frames, clock=trio.testing.MockClock(autojump_threshold=0))
    content = {
        "version": VERSION,
        "messages": {name: joined(golden.parts).hex() for name, golden in messages().items()},
        "frame": encode_frame(joined(messages()["where"].parts)).hex(),
        "record": record()[1].hex(),
        "asked": [frame.hex() for frame in frames],
        "answers": [frame.hex() for frame in said],
    }
    DATA.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
