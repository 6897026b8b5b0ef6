"""Each number in a message is taken up to its bounds, and refused one beyond; each text up to its length."""

from __future__ import annotations

from typing import Any

import pytest

from tensor_codec.blocks import MAX_BLOCKS
from tensor_codec.errors import MessageError
from tensor_codec.header import pack_header, split_message
from tensor_codec.messages.contract import (
    MAX_EPOCH,
    MAX_HOPS,
    MAX_QUEUE,
    MAX_STEP,
    MAX_TOKENS,
    Contract,
    StepRange,
)
from tensor_codec.messages.session import (
    Here,
    Open,
    Opened,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    decode_from_client,
    decode_from_hop,
    decode_open,
    decode_open_reply,
    encode_opened,
    encode_result,
    encode_step,
)

LENGTH = 20
CONTRACT = Contract(bytes(16), 0, 4, 2, LENGTH, 3, "bf16", 8)  # four positions a step
OPEN: dict[str, Any] = {  # Any: MessagePack
    "k": "open",
    "s": bytes(16),
    "model": "m",
    "revision": "r",
    "start": 0,
    "stop": MAX_BLOCKS,
    "batch": 1,
    "max_length": 1,
    "dtype": "bfloat16",
    "codec": "bf16",
}
STEP: dict[str, Any] = {"k": "step", "s": bytes(16), "n": 0, "p": 0, "r": 0}
RESUME = {"k": "resume", "p": LENGTH, "has": 0, "stop": 0}
RELINKED = {"k": "relinked", "push": True, "cut": True, "p": LENGTH, "kept": 0}
FAILED = {"k": "failed", "code": "protocol", "message": "m"}
ROW = bytes(CONTRACT.row_bytes)


def read(header: dict[str, Any], body: bytes = b"") -> Any:
    """The value of a frame with this header."""
    frame = pack_header(header) + body
    if header["k"] == "open":
        return decode_open(frame)
    if header["k"] == "opened":
        return decode_open_reply(frame)
    if header["k"] in ("step", "relink", "resume"):
        return decode_from_client(frame, CONTRACT)
    return decode_from_hop(frame, CONTRACT)


@pytest.mark.parametrize(
    ("header", "body", "name", "low", "high", "attribute"),
    [
        (OPEN, b"", "batch", 1, MAX_TOKENS, "batch"),
        (OPEN, b"", "max_length", 1, MAX_TOKENS, "max_length"),
        (OPEN, b"", "epoch", 0, MAX_EPOCH, "epoch"),
        ({"k": "opened", "push": True}, b"", "q", 0, MAX_QUEUE, "queue"),
        (STEP, ROW, "p", 0, LENGTH - 1, "position"),
        (STEP, ROW, "n", 0, MAX_STEP, "step"),
        (STEP, ROW, "r", 0, 3, None),
        (STEP, ROW, "e", 0, MAX_EPOCH, "epoch"),
        (STEP, ROW, "l", 0, LENGTH, "rope_length"),
        ({"k": "result", "n": 0, "p": 0}, b"", "n", 0, MAX_STEP, "step"),
        ({"k": "result", "n": 0, "p": 0}, b"", "p", 0, LENGTH, "position"),
        ({"k": "result", "n": 0, "p": 0}, b"", "e", 0, MAX_EPOCH, "epoch"),
        ({"k": "result", "n": 0, "p": 0}, b"", "l", 0, LENGTH, "rope_length"),
        ({"k": "relink"}, b"", "e", 0, MAX_EPOCH, "epoch"),
        (RESUME, b"", "e", 0, MAX_EPOCH, "epoch"),
        (RESUME, b"", "p", 0, LENGTH, "length"),
        (RESUME, b"", "has", 0, LENGTH, "has"),
        (RESUME, b"", "stop", 0, LENGTH, "stop"),
        (RESUME, b"", "n", 0, MAX_STEP, "step"),
        (RELINKED, b"", "e", 0, MAX_EPOCH, "epoch"),
        (RELINKED, b"", "p", 0, LENGTH, "length"),
        (RELINKED, b"", "kept", 0, LENGTH, "kept"),
        (RELINKED, b"", "n", 0, MAX_STEP, "step"),
        (RELINKED, b"", "w", 0, MAX_STEP + 1, "orders"),
        ({"k": "here", "p": 0, "waiting": 0}, b"", "p", 0, LENGTH, "length"),
        ({"k": "here", "p": 0, "waiting": 0}, b"", "waiting", 0, MAX_TOKENS, "waiting"),
        ({"k": "here", "p": 0, "waiting": 0}, b"", "n", 0, MAX_STEP, "step"),
        (FAILED, b"", "retry", 0, 3600, "retry_after_seconds"),
        (FAILED, b"", "n", 0, MAX_STEP, "step"),
    ],
)
def test_a_number_is_taken_up_to_its_bounds(header, body, name, low, high, attribute):
    for value in (low, high):
        found = read({**header, name: value}, body)
        assert attribute is None or getattr(found, attribute) == value
    for value in (low - 1, high + 1):
        with pytest.raises(MessageError, match=f"^{name} is {value}"):
            read({**header, name: value}, body)


@pytest.mark.parametrize(
    ("header", "name", "most"),
    [
        (OPEN, "model", 256),
        (OPEN, "revision", 128),
        (OPEN, "adapter", 256),
        (OPEN, "predecessor", 128),
        (OPEN, "successor", 128),
        ({"k": "relink"}, "predecessor", 128),
        ({"k": "relink"}, "successor", 128),
        (FAILED, "message", 300),
        (FAILED, "peer", 128),
    ],
)
def test_a_text_is_taken_up_to_its_length(header, name, most):
    read({**header, name: "a" * most})
    with pytest.raises(MessageError, match=f"^{name} is str of {most + 1}, printable text of at most {most}"):
        read({**header, name: "a" * (most + 1)})
    with pytest.raises(MessageError, match=f"^{name} is ''"):
        read({**header, name: ""})


@pytest.mark.parametrize(
    ("start", "stop", "name"),
    [(-1, 1, "start"), (MAX_BLOCKS, 1, "start"), (3, 3, "stop"), (0, MAX_BLOCKS + 1, "stop")],
)
def test_blocks_that_no_model_has_are_refused(start, stop, name):
    assert str(read({**OPEN, "start": MAX_BLOCKS - 1}).spec.blocks) == f"{MAX_BLOCKS - 1}:{MAX_BLOCKS}"
    with pytest.raises(MessageError, match=f"^{name} is "):
        read({**OPEN, "start": start, "stop": stop})


def test_what_a_message_does_not_say_has_its_usual_value():
    found = read(OPEN)
    assert isinstance(found, Open)
    assert (found.predecessor, found.successor, found.relay, found.epoch, found.held) == (
        None,
        None,
        False,
        0,
        False,
    )
    assert found.spec.adapter is None
    assert read({"k": "opened", "push": False}) == Opened(False, True, 0.0)
    assert read({"k": "relink"}) == Relink(0)
    assert read(RESUME) == Resume(0, LENGTH)
    assert read(RELINKED) == Relinked(0, True, LENGTH, 0)
    assert read({"k": "here", "p": 3, "waiting": 2}) == Here(3, 2)
    assert read(STEP, ROW) == Step(bytes(16), 0, 0, "all", ROW)
    assert read({"k": "result", "n": 4, "p": 2}) == Result(4, 2, b"")


@pytest.mark.parametrize(("position", "most"), [(0, 4), (16, 4), (17, 3), (19, 1)])
def test_a_step_and_its_answer_carry_what_the_contract_and_the_session_leave(position, most):
    for header in ({**STEP, "p": position}, {"k": "result", "n": 0, "p": position}):
        assert len(read(header, ROW * most).body) == most * len(ROW)
        for body in (ROW * (most + 1), ROW * most + b"x", ROW[:-1]):
            with pytest.raises(MessageError, match=f"{len(body)} body bytes"):
                read(header, body)
    with pytest.raises(MessageError, match=rf"1\.\.{most} positions of 12 bytes"):
        read({**STEP, "p": position})


def test_what_is_to_be_sent_again_is_in_the_cache():
    assert read({**RESUME, "p": 7, "stop": 7}).stop == 7
    with pytest.raises(MessageError, match="outputs up to 8 are to be sent again, the cache is to hold 7"):
        read({**RESUME, "p": 7, "stop": 8})
    assert read({**RELINKED, "p": 7, "kept": 7}).kept == 7
    with pytest.raises(MessageError, match=r"^kept is 8"):
        read({**RELINKED, "p": 7, "kept": 8})


@pytest.mark.parametrize(
    "times",
    [[[1, 2, 3]], [[1]], [(1.0, 2)], [[1, 2.0]], [[-1, 2]], [[1, -1]], ["ab"], [[0, 0]] * (MAX_HOPS + 1)],
)
def test_times_are_pairs_of_microseconds_of_at_most_64_hops(times):
    assert read({**STEP, "t": [[0, 0]] * MAX_HOPS}, ROW).timings == ((0, 0),) * MAX_HOPS
    with pytest.raises(MessageError):
        read({**STEP, "t": times}, ROW)


@pytest.mark.parametrize(
    ("batch", "tokens", "most"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (8, 8, 1), (9, 8, 1), (1, 99, LENGTH)]
)
def test_a_step_has_one_position_of_all_rows_at_least(batch, tokens, most):
    contract = Contract(bytes(16), 0, 4, batch, LENGTH, 3, "fp32", tokens)
    assert (contract.max_tokens, contract.row_bytes) == (most, batch * 3 * 4)


@pytest.mark.parametrize(("reply", "count"), [("all", 5), ("last", 1), ("none", 0), ("replay", 0)])
def test_a_reply_covers_the_last_positions_of_its_step(reply, count):
    step = StepRange(7, 5, reply)
    assert (step.reply_tokens, step.reply_position) == (count, 12 - count)


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        (encode_opened(Opened(True, False, 2.5)), {"k": "opened", "push": True, "cut": False, "q": 2.5}),
        (
            encode_step(Step(bytes(16), 7, 3, "last", ROW, ((1, 2),), 5, True, 9)),
            {**STEP, "n": 7, "p": 3, "r": 1, "t": [[1, 2]], "e": 5, "b": True, "l": 9},
        ),
        (
            encode_result(Result(7, 3, ROW, ((1, 2),), 5, True, 9)),
            {"k": "result", "n": 7, "p": 3, "t": [[1, 2]], "e": 5, "replay": True, "l": 9},
        ),
    ],
    ids=["opened", "step", "result"],
)
def test_every_field_has_its_name_on_the_wire_and_comes_back(parts, fields):
    header, body = split_message(b"".join(parts))
    assert header._fields == fields
    found = read(fields, bytes(body))
    encode: Any = {"opened": encode_opened, "step": encode_step, "result": encode_result}[fields["k"]]
    assert b"".join(encode(found)) == b"".join(parts)
