"""Steps of many sessions in one frame, and results of many sessions in another.

A hop computes the tokens of many sessions as one batch, and the outputs that go to one peer travel together:

    hop -> next hop, client -> first hop    steps
    last hop -> client                      results

Each of them is still a step, or a result, of its own session.  The header says how many there are, and of how
many hops each brings the timings.  The body has a record of fixed size for each, and then their hidden states
one after the other.  Only peers that say so get these messages: servers in their record (`batches`), clients
by the message `gather`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header
from tensor_codec.limits import KIB
from tensor_codec.messages.contract import (
    MAX_EPOCH,
    MAX_HOPS,
    MAX_STEP,
    REPLIES,
    REPLY_CODES,
    SESSION_ID_BYTES,
    Contract,
)
from tensor_codec.messages.fields import Message, no_body
from tensor_codec.messages.session import GATHER_BYTES, OWNER_BYTES, Result, Step

FRAME_BYTES = 60 * KIB  # goes out in one piece of the muxer, and is read like the frame of a token
T = TypeVar("T")
_NO_OWNER = bytes(OWNER_BYTES)
_MAX_MICROS = (1 << 32) - 1


@cache
def _step(hops: int) -> struct.Struct:
    """Of a step: session, owner's tag (zeros: none), step, position, epoch, bytes of hidden states, reply.

    Then for each hop passed the microseconds that it held the step, and that it computed.
    """
    return struct.Struct(f">{SESSION_ID_BYTES}s{OWNER_BYTES}sQIIIB{2 * hops}I")


@cache
def _result(hops: int) -> struct.Struct:
    """Of a result: session, step, position, epoch, bytes of its hidden states; then as of a step."""
    return struct.Struct(f">{SESSION_ID_BYTES}sQIII{2 * hops}I")


def travels_with_others(step: Step) -> bool:
    """Whether a frame of many steps has room for all that this step says."""
    return not (
        step.bulk or step.rope_length or step.rows or step.packed or step.speeds or step.reply == "replay"
    )


def comes_with_others(result: Result) -> bool:
    """Whether a frame of many results has room for all that this result says."""
    return not (result.replay or result.rope_length or result.speeds)


def encode_steps(steps: Sequence[Step]) -> list[Buffer]:
    """The parts of a frame.  All of `steps` passed equally many hops, and each `travels_with_others`."""
    hops = len(steps[0].timings)
    pack = _step(hops).pack
    table = bytearray()
    for step in steps:
        table += pack(
            step.session, step.owner or _NO_OWNER, step.step, step.position, step.epoch, len(step.body),
            REPLY_CODES[step.reply], *_flat(step.timings),
        )  # fmt: skip
    header = pack_header({"k": "steps", "c": len(steps), "h": hops})
    return [header, table, *[step.body for step in steps]]


def encode_results(results: Sequence[tuple[bytes, Result]]) -> list[Buffer]:
    """The parts of a frame, of results and their sessions' ids.

    All of them passed equally many hops, and each `comes_with_others`.
    """
    hops = len(results[0][1].timings)
    pack = _result(hops).pack
    table = bytearray()
    for session, result in results:
        table += pack(
            session, result.step, result.position, result.epoch, len(result.body), *_flat(result.timings)
        )
    header = pack_header({"k": "results", "c": len(results), "h": hops})
    return [header, table, *[result.body for _, result in results]]


def encode_gather(id: bytes) -> list[Buffer]:
    """The parts of a frame: `results` of sessions with this id in `Open.gather` may come on its stream."""
    return [pack_header({"k": "gather", "i": id})]


def read_gather(message: Message) -> bytes:
    """The id.  Raises MessageError."""
    no_body(message)
    return message.header.binary("i", GATHER_BYTES)


def read_steps(message: Message, most: int) -> list[Step]:
    """The steps of a frame, at most `most`.  Raises MessageError.

    What their sessions allow is for `check_step` to say.  The bodies are copies: one step that waits does
    not keep the whole frame.
    """
    records, bodies = _divided(message, most, _step)
    steps = []
    for session, owner, number, position, epoch, size, reply, *timings in records:
        if number > MAX_STEP or epoch > MAX_EPOCH or reply not in REPLIES:
            raise MessageError(f"step {number} with reply {reply} in epoch {epoch}")
        body, bodies = bytes(bodies[:size]), bodies[size:]
        if len(body) != size or not size:
            raise MessageError(f"a step of {size} body bytes, {len(body)} are left")
        tag = b"" if owner == _NO_OWNER else owner
        passed = tuple(zip(timings[::2], timings[1::2], strict=True))
        steps.append(Step(session, number, position, REPLIES[reply], body, passed, epoch, owner=tag))
    _check_end(bodies)
    return steps


def read_results(message: Message, most: int) -> list[tuple[bytes, Result]]:
    """The results of a frame and the ids of their sessions, at most `most`.  Raises MessageError.

    What their sessions allow is for `check_result` to say.
    """
    records, bodies = _divided(message, most, _result)
    results = []
    for session, number, position, epoch, size, *timings in records:
        if number > MAX_STEP or epoch > MAX_EPOCH:
            raise MessageError(f"result {number} in epoch {epoch}")
        body, bodies = bytes(bodies[:size]), bodies[size:]
        if len(body) != size:
            raise MessageError(f"a result of {size} body bytes, {len(body)} are left")
        passed = tuple(zip(timings[::2], timings[1::2], strict=True))
        results.append((session, Result(number, position, body, passed, epoch)))
    _check_end(bodies)
    return results


def _divided(
    message: Message, most: int, record: Callable[[int], struct.Struct]
) -> tuple[Iterator[tuple[Any, ...]], memoryview]:  # Any: whole numbers and bytes, as the record says
    """The records of a frame, and the hidden states after them.  Raises MessageError."""
    count = message.header.integer("c", 1, most)
    layout = record(message.header.integer("h", 0, MAX_HOPS))
    size = count * layout.size
    if len(message.body) < size:
        raise MessageError(f"{len(message.body)} body bytes, {count} records of {layout.size} are announced")
    return layout.iter_unpack(message.body[:size]), message.body[size:]


def _check_end(bodies: memoryview) -> None:
    if len(bodies):
        raise MessageError(f"{len(bodies)} body bytes after the last one")


def _flat(timings: Sequence[tuple[int, int]]) -> list[int]:
    return [min(micros, _MAX_MICROS) for pair in timings for micros in pair]


def check_step(step: Step, contract: Contract) -> None:
    """Raise MessageError where the session of a step does not allow it: see `read_step`."""
    tokens, rest = divmod(len(step.body), contract.row_bytes)
    room = min(contract.max_tokens, contract.max_length - step.position)
    if rest or not 0 < tokens <= room or step.reply == "replay":
        raise MessageError(
            f"{len(step.body)} body bytes at position {step.position}, 1..{room} positions of"
            f" {contract.row_bytes} bytes are allowed"
        )


def check_result(result: Result, contract: Contract) -> None:
    """Raise MessageError where the session of a result does not allow it."""
    tokens, rest = divmod(len(result.body), contract.row_bytes)
    if rest or tokens > min(contract.max_tokens, contract.max_length - result.position):
        raise MessageError(
            f"{len(result.body)} body bytes at position {result.position},"
            f" positions of {contract.row_bytes} bytes are allowed"
        )


def bytes_of(one: Step | Result) -> int:
    """Bytes that a step or a result adds to a frame of many."""
    layout = _step if isinstance(one, Step) else _result
    return layout(len(one.timings)).size + len(one.body)


def grouped(items: Iterable[T], message_of: Callable[[T], Step | Result], most: int) -> Iterator[list[T]]:
    """`items` in groups, each for one frame, in the order of their first items.

    message_of: of an item.  most: items of a group.  The messages of a group take at most FRAME_BYTES and
    passed equally many hops; one that cannot travel with others is alone.
    """
    open_groups: dict[int, tuple[list[T], int]] = {}
    groups: list[list[T]] = []
    for item in items:
        message = message_of(item)
        shares = travels_with_others(message) if isinstance(message, Step) else comes_with_others(message)
        if not shares:
            groups.append([item])
            open_groups.clear()  # or a later step of its session could come before it
            continue
        size, hops = bytes_of(message), len(message.timings)
        group, held = open_groups.get(hops, ([], 0))
        if not group or len(group) == most or held + size > FRAME_BYTES:
            group, held = [], 0
            groups.append(group)
        group.append(item)
        open_groups[hops] = group, held + size
    return iter(groups)
