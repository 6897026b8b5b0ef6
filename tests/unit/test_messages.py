"""Messages: round trips, and what a peer may send against its contract."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.blocks import MAX_BLOCKS, Blocks
from tensor_codec.errors import (
    REFUSALS,
    BadResult,
    CacheFull,
    Draining,
    FrameError,
    MessageError,
    NotAMember,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
    TooManyStreams,
    WrongRevision,
)
from tensor_codec.header import pack_header, split_message
from tensor_codec.messages.contract import MAX_HOPS, MAX_TOKENS, VALUE_BYTES, Contract, StepRange
from tensor_codec.messages.fields import FAULTS, Failed, encode_failed, read_message
from tensor_codec.messages.forward_backward import (
    Backward,
    Forward,
    Output,
    Run,
    decode_output,
    decode_request,
    encode_output,
    encode_request,
    prompts_contract,
    request_contract,
)
from tensor_codec.messages.info import (
    PeerInfo,
    decode_describe,
    decode_info,
    encode_describe,
    encode_info,
)
from tensor_codec.messages.session import (
    Close,
    Here,
    Open,
    Opened,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    Where,
    check_prompts,
    decode_from_client,
    decode_from_hop,
    decode_open,
    decode_open_reply,
    encode_close,
    encode_here,
    encode_open,
    encode_opened,
    encode_relink,
    encode_relinked,
    encode_result,
    encode_resume,
    encode_step,
    encode_where,
    owner_tag,
    read_step,
    step_epoch,
    step_session,
)
from tensor_codec.rows.row_order import MAX_ORDERED_ROWS
from tensor_codec.span_spec import SpanSpec

ID = bytes(range(16))
CONTRACT = Contract(
    session=ID, start=2, stop=5, batch=2, max_length=10, hidden=4, codec="fp32", max_step_tokens=12
)
ROW = 2 * 4 * 4  # bytes of one position
SPEC = SpanSpec("m", "r", Blocks(2, 5), "float32")
INFO = PeerInfo(
    "online", "m", "r", 6, 0, 3, "float32", "none", 1, 64, 96, 16, 64, 32, 1.0, 1e-3, 1e-4, "name", "0.1"
)
OPEN = Open(ID, SPEC, 2, 10, "fp32")


def joined(parts) -> bytes:
    return b"".join(bytes(part) for part in parts)


def step_frame(body: bytes = bytes(ROW), /, **changes) -> bytes:
    return header_of({"k": "step", "s": ID, "n": 3, "p": 1, "r": 0}, changes) + body


def result_frame(body: bytes = bytes(ROW), /, **changes) -> bytes:
    return header_of({"k": "result", "n": 3, "p": 1}, changes) + body


def open_frame(body: bytes = b"", /, **changes) -> bytes:
    fields = {
        "k": "open",
        "s": ID,
        "model": "m",
        "revision": "r",
        "start": 2,
        "stop": 5,
        "batch": 2,
        "max_length": 10,
        "dtype": "float32",
        "codec": "fp32",
    }
    return header_of(fields, changes) + body


RUN = Run(SPEC, 2, "fp32")
REQUEST_TOKENS = 12  # batch * tokens of one request
ASKED = replace(CONTRACT, session=b"", max_length=3)  # of a request of three positions


def request_frame(body: bytes = bytes(3 * ROW), /, **changes) -> bytes:
    fields = {
        "k": "forward",
        "model": "m",
        "revision": "r",
        "start": 2,
        "stop": 5,
        "batch": 2,
        "dtype": "float32",
        "codec": "fp32",
    }
    return header_of(fields, changes) + body


def output_frame(body: bytes = bytes(3 * ROW), /, **changes) -> bytes:
    return header_of({"k": "output"}, changes) + body


def read_request(frame: bytes) -> tuple[Forward | Backward, Contract]:
    request = decode_request(frame).divided(4)
    return request, request_contract(request, 4, REQUEST_TOKENS)


def header_of(fields: dict, changes: dict) -> bytes:
    """The header with some fields changed; ... takes one out."""
    return pack_header({k: v for k, v in (fields | changes).items() if v is not ...})


ORDERS = [
    (encode_relink, Relink(1), decode_from_client),
    (encode_relink, Relink(2**31, "before", "behind", relay=True), decode_from_client),
    (encode_relink, Relink(1, codec="fp32"), decode_from_client),
    (encode_relink, Relink(1, pack=2), decode_from_client),
    (encode_resume, Resume(3, 10, 4, 9), decode_from_client),
    (encode_resume, Resume(3, 10, 4, 9, 0), decode_from_client),
    (encode_resume, Resume(3, 10, 4, 9, 2**53), decode_from_client),
    (lambda _: encode_where(), Where(), decode_from_client),
    (encode_relinked, Relinked(1, push=True, length=10, kept=3), decode_from_hop),
    (encode_relinked, Relinked(1, push=False, length=0, kept=0, step=2**53, cut=False), decode_from_hop),
    (encode_relinked, Relinked(1, push=True, length=10, kept=3, codec="bf16"), decode_from_hop),
    (encode_relinked, Relinked(1, push=True, length=10, kept=3, orders=7), decode_from_hop),
    (encode_here, Here(9, 3), decode_from_hop),
    (encode_here, Here(0, 0, 17), decode_from_hop),
]


@pytest.mark.parametrize(("encode", "message", "decode"), ORDERS, ids=lambda value: type(value).__name__)
def test_orders_and_their_answers_come_out_as_they_went_in(encode, message, decode):
    assert decode(joined(encode(message)), CONTRACT) == message


BAD_ORDERS: dict[str, tuple[dict, Callable]] = {
    "a relink without an epoch is of the first": ({"k": "relink", "e": -1}, decode_from_client),
    "a resume behind the end": ({"k": "resume", "e": 1, "p": 11, "has": 0, "stop": 0}, decode_from_client),
    "a replay behind what is kept": (
        {"k": "resume", "e": 1, "p": 3, "has": 0, "stop": 4},
        decode_from_client,
    ),
    "a resume without a length": ({"k": "resume", "e": 1, "has": 0, "stop": 0}, decode_from_client),
    "an epoch that is true": ({"k": "relink", "e": True}, decode_from_client),
    "a new codec that nobody knows": ({"k": "relink", "e": 1, "codec": "int3"}, decode_from_client),
    "a journal longer than the cache": (
        {"k": "relinked", "e": 1, "push": True, "cut": True, "p": 3, "kept": 4},
        decode_from_hop,
    ),
    "a cache longer than the session": ({"k": "here", "p": 11, "waiting": 0}, decode_from_hop),
    "fewer than no steps": ({"k": "here", "p": 1, "waiting": -1}, decode_from_hop),
}


@pytest.mark.parametrize("wrong", BAD_ORDERS)
def test_an_order_that_cannot_be_meant_is_refused(wrong):
    fields, decode = BAD_ORDERS[wrong]
    with pytest.raises(MessageError):
        decode(pack_header(fields), CONTRACT)
    with pytest.raises(MessageError):
        decode(pack_header({"k": fields["k"]}) + b"body", CONTRACT)


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=60)
timings = st.lists(st.tuples(*[st.integers(0, 2**40)] * 2), max_size=MAX_HOPS).map(tuple)
replies = st.sampled_from(["all", "last", "none", "replay"])
numbers = st.integers(0, 2**53)


@st.composite
def opens(draw):
    start = draw(st.integers(0, MAX_BLOCKS - 1))
    return Open(
        session=draw(st.binary(min_size=16, max_size=16)),
        spec=SpanSpec(
            model=draw(names),
            revision=draw(names),
            blocks=Blocks(start, draw(st.integers(start + 1, MAX_BLOCKS))),
            dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
            adapter=draw(st.none() | names),
        ),
        batch=draw(st.integers(1, MAX_TOKENS)),
        max_length=draw(st.integers(1, MAX_TOKENS)),
        codec=draw(st.sampled_from(sorted(VALUE_BYTES))),
        predecessor=draw(st.none() | names),
        successor=draw(st.none() | names),
    )


@given(opens())
def test_an_open_comes_back_as_it_was(message):
    assert decode_open(joined(encode_open(message))) == message
    packing = replace(message, pack=3)
    assert decode_open(joined(encode_open(packing))) == packing


FULL_OPEN = Open(
    bytes(range(16)),
    SpanSpec("m", "r", Blocks(2, 5), "float32"),
    batch=2,
    max_length=10,
    codec="bf16",
    predecessor="before",
    relay=True,
    epoch=7,
    held=True,
    prompts=3,
    body=bytes(3 * 3 * 4 * 2),  # blocks, prompts, hidden, bytes of bf16
)


def test_an_open_with_every_field_comes_back_as_it_was():
    found = decode_open(joined(encode_open(FULL_OPEN)))
    assert replace(found, body=bytes(found.body)) == FULL_OPEN
    check_prompts(found, hidden=4)
    for hidden in (3, 5, 8):
        with pytest.raises(MessageError, match="72 body bytes, prompts of 3 positions take"):
            check_prompts(found, hidden)
    with pytest.raises(MessageError, match="prompts of 3 positions for a session of 2"):
        check_prompts(replace(found, max_length=2), hidden=4)
    check_prompts(replace(found, max_length=3), hidden=4)
    assert len(encode_open(replace(FULL_OPEN, prompts=0))) == 1, "without prompts there is no body"


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({"prompts": 0}, FULL_OPEN.body),
        ({"prompts": MAX_TOKENS + 1}, bytes(3 * (MAX_TOKENS + 1) * 2)),
        ({"prompts": True}, FULL_OPEN.body),
        ({}, b""),
        ({}, FULL_OPEN.body[:-1]),
        ({"prompts": ...}, FULL_OPEN.body),
    ],
)
def test_prompts_of_an_open_that_cannot_be_are_refused(changes, body):
    fields = msgpack.unpackb(bytes(encode_open(FULL_OPEN)[0])[2:])
    with pytest.raises(MessageError):
        decode_open(header_of(fields, changes) + body)


def test_a_hop_says_whether_it_can_reorder_rows():
    for rows in (False, True):
        assert decode_open_reply(joined(encode_opened(Opened(True, rows=rows)))).rows is rows


def test_a_step_is_read_for_its_session_and_epoch_before_its_contract_is_known():
    step = Step(ID, 3, 4, "last", bytes(ROW), epoch=9)
    message = read_message(joined(encode_step(step)), frozenset({"step"}))
    assert (step_session(message), step_epoch(message)) == ((ID, b""), 9)
    message = read_message(joined(encode_step(replace(step, owner=owner_tag("a")))), frozenset({"step"}))
    assert step_session(message) == (ID, owner_tag("a"))
    first = read_message(joined(encode_step(replace(step, epoch=0))), frozenset({"step"}))
    assert step_epoch(first) == 0
    for size in (15, 17):
        short = read_message(header_of({"k": "step", "s": bytes(size)}, {}), frozenset({"step"}))
        with pytest.raises(MessageError):
            step_session(short)


@given(numbers, st.integers(0, 9), st.integers(1, 6), replies, timings, st.integers(0, 10), st.data())
def test_a_step_comes_back_as_it_was(number, position, tokens, reply, times, rope_length, data):
    tokens = min(tokens, CONTRACT.max_length - position)
    body = data.draw(st.binary(min_size=tokens * ROW, max_size=tokens * ROW))
    message = Step(ID, number, position, reply, body, times, rope_length=rope_length)
    found = decode_from_client(joined(encode_step(message)), CONTRACT)
    assert isinstance(found, Step)
    assert replace(found, body=bytes(found.body)) == message


@given(st.integers(1, 6), st.lists(st.integers(0, 1 << 40), max_size=MAX_HOPS))
def test_a_packed_step_comes_back_as_it_was_and_with_it_the_speeds_of_the_links(tokens, speeds):
    body = bytes(tokens * CONTRACT.packed_row_bytes)
    message = Step(ID, 3, 1, "last", body, packed=True, speeds=tuple(speeds))
    found = decode_from_client(joined(encode_step(message)), CONTRACT)
    assert isinstance(found, Step)
    assert replace(found, body=bytes(found.body)) == message
    result = Result(3, 1, bytes(ROW), speeds=tuple(speeds))
    assert decode_from_hop(joined(encode_result(result)), CONTRACT) == result


def test_a_packed_step_is_refused_where_nothing_may_be_lost():
    step = step_frame(bytes(CONTRACT.packed_row_bytes), c="int8o")
    with pytest.raises(MessageError, match="a step in int8o, which this node does not take"):
        decode_from_client(step, replace(CONTRACT, packs=False))


@given(numbers, st.tuples(st.integers(0, 1), st.integers(0, 1)))
def test_an_order_of_rows_comes_back_as_it_was(number, rows):
    message = Step(ID, number, 4, "last", bytes(ROW), rows=rows)
    found = decode_from_client(joined(encode_step(message)), CONTRACT)
    assert isinstance(found, Step)
    assert found.rows == rows


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"w": b"\0\0"}, "w is b'.*', 4 bytes are allowed"),
        ({"w": bytes(6)}, "w is b'.*', 4 bytes are allowed"),
        ({"w": b"\0\0\0\2"}, "row 2 in an order of rows, 0..1 are allowed"),
        ({"w": b"\1\0\0\1"}, "row 256 in an order of rows"),
        ({"w": [0, 1]}, r"w is \[0, 1\], 4 bytes are allowed"),
        ({"w": None}, "w is None, 4 bytes are allowed"),
        ({"w": bytes(4), "r": 3}, "a part of a replay with an order of rows"),
    ],
)
def test_an_order_of_rows_that_cannot_be_is_refused(changes, why):
    header = {"k": "step", "s": ID, "n": 1, "p": 4, "r": 0}
    with pytest.raises(MessageError, match=why):
        decode_from_client(pack_header(header | changes) + bytes(ROW), CONTRACT)


def test_an_order_of_more_rows_than_a_header_takes_is_refused():
    for rows in (MAX_ORDERED_ROWS, MAX_ORDERED_ROWS + 1):
        contract = replace(CONTRACT, batch=rows)
        step = Step(
            ID, 1, 4, "last", bytes(contract.row_bytes), ((1 << 32, 1 << 32),) * MAX_HOPS, rows=(0,) * rows
        )
        if rows == MAX_ORDERED_ROWS:
            assert decode_from_client(joined(encode_step(step)), contract).rows == step.rows
        else:
            with pytest.raises(MessageError, match="an order of 1025 rows, 1024 at most are allowed"):
                decode_from_client(joined(encode_step(step)), contract)


@given(numbers, st.integers(0, 10), st.integers(0, 6), timings, st.integers(0, 10))
def test_a_result_comes_back_as_it_was(number, position, tokens, times, rope_length):
    tokens = min(tokens, CONTRACT.max_length - position)
    message = Result(number, position, bytes(tokens * ROW), times, rope_length=rope_length)
    found = decode_from_hop(joined(encode_result(message)), CONTRACT)
    assert isinstance(found, Result)
    assert replace(found, body=bytes(found.body)) == message


@given(
    st.sampled_from(sorted(FAULTS) + sorted(REFUSALS)),
    names,
    st.none() | st.floats(0, 3600),
    st.none() | numbers,
    st.none() | names,
)
def test_a_failure_comes_back_as_it_was(code, text, retry, step, peer):
    message = Failed(code, text, retry, step, peer)
    assert decode_from_hop(joined(encode_failed(message)), CONTRACT) == message
    assert decode_open_reply(joined(encode_failed(message))) == message


@given(opens(), st.integers(1, 6), st.booleans(), st.data())
def test_a_stateless_request_comes_back_as_it_was(like, tokens, backward, data):
    run = Run(like.spec, 2, like.codec)
    size = tokens * 2 * 4 * VALUE_BYTES[run.codec]
    hidden, grad = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    message = Backward(run, hidden, grad) if backward else Forward(run, hidden)
    found, contract = read_request(joined(encode_request(message)))
    assert type(found) is type(message)
    assert (found.run, bytes(found.hidden)) == (run, hidden)
    assert not backward or bytes(found.grad) == grad
    assert (contract.start, contract.stop, contract.batch) == (*run.spec.blocks, 2)
    assert (contract.max_length, contract.hidden, contract.codec) == (tokens, 4, run.codec)


@given(opens(), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_a_stateless_request_with_prompts_comes_back_as_it_was(like, tokens, prompts, backward, data):
    run = Run(like.spec, 2, like.codec, min(prompts, tokens))
    vector = 4 * VALUE_BYTES[run.codec]
    size = tokens * 2 * vector
    hidden, grad = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    own = bytes([7]) * (like.spec.blocks.size * run.prompts * vector)
    message = Backward(run, hidden, grad, own) if backward else Forward(run, hidden, own)
    found, contract = read_request(joined(encode_request(message)))
    assert found == message
    assert contract.max_length == tokens
    assert prompts_contract(contract, run.prompts).row_bytes * run.prompts == len(own)
    answer = decode_output(joined(encode_output(Output(hidden, (), own))), contract, run.prompts)
    assert answer == Output(hidden, (), own)
    for wrong in (own[1:], own + own, b""):
        with pytest.raises(MessageError):
            decode_output(joined(encode_output(Output(hidden, (), wrong))), contract, run.prompts)


@given(opens(), st.integers(1, 6), st.binary(min_size=16, max_size=16), st.booleans(), st.data())
def test_a_request_with_a_tape_comes_back_as_it_was_and_a_backward_is_a_gradient_alone(
    like, tokens, tape, backward, data
):
    run = Run(like.spec, 2, like.codec, data.draw(st.integers(0, tokens)), tape)
    vector = 4 * VALUE_BYTES[run.codec]
    states = data.draw(st.binary(min_size=2 * tokens * vector, max_size=2 * tokens * vector))
    prompts = bytes(like.spec.blocks.size * run.prompts * vector)
    message = Backward(run, b"", states) if backward else Forward(run, states, prompts)
    found, contract = read_request(joined(encode_request(message)))
    assert found == message
    assert (contract.batch, contract.max_length) == (2, tokens)
    own = prompts if backward else b""
    output = Output(states, (), own, taped=data.draw(st.booleans()))
    assert decode_output(joined(encode_output(output)), contract, run.prompts if backward else 0) == output


@pytest.mark.parametrize(
    ("body", "changes", "words"),
    [
        (bytes(3 * ROW), {"tape": bytes(15)}, "tape is b'.*, 16 bytes are allowed"),
        (bytes(3 * ROW), {"tape": "x" * 16}, "16 bytes are allowed"),
        (b"", {"tape": bytes(16), "k": "backward"}, "0 bytes of a gradient in 2 rows"),
        (bytes(ROW + 1), {"tape": bytes(16), "k": "backward"}, "bytes of a gradient in 2 rows"),
        (
            bytes(2 * ROW),
            {"tape": bytes(16), "k": "backward", "prompts": 3},
            "prompts of 3 positions for rows",
        ),
    ],
)
def test_a_tape_that_cannot_be_is_refused_with_the_numbers(body, changes, words):
    with pytest.raises(MessageError, match=words):
        read_request(request_frame(body, **changes))


@pytest.mark.parametrize("taped", [1, "true", []])
def test_an_answer_says_true_or_false_about_its_tape(taped):
    with pytest.raises(MessageError, match="true or false"):
        decode_output(output_frame(tape=taped), ASKED)


@pytest.mark.parametrize(
    ("body", "changes", "words"),
    [
        (bytes(3 * ROW), {"prompts": 0}, "prompts"),
        (bytes(3 * ROW), {"prompts": 2.0}, "prompts"),
        (bytes(ROW), {"prompts": 1}, "body bytes, prompts of 1 positions take 48"),
        (bytes(3 * ROW // 2 + 2 * ROW), {"prompts": 3}, "body bytes, prompts of 3 positions take 144"),
        (bytes(9 * ROW // 2 + 2 * ROW), {"prompts": 3}, "prompts of 3 positions for rows of 2"),
        (bytes(3 * ROW // 2 + 3 * ROW + 1), {"prompts": 1, "k": "backward"}, "not two tensors of one size"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_with_the_numbers(body, changes, words):
    with pytest.raises(MessageError, match=words):
        read_request(request_frame(body, **changes))


def test_a_peer_s_state_comes_back_as_it_was_or_as_a_refusal():
    assert decode_info(joined(encode_info(INFO))) == INFO
    assert INFO.span == Blocks(0, 3)
    assert decode_info(joined(encode_info(replace(INFO, threads=4)))).threads == 4  # 0: an older version
    failed = Failed("draining", "loading", 2.0)
    assert decode_info(joined(encode_failed(failed))) == failed


@pytest.mark.parametrize(
    ("key", "allowed", "refused"),
    [
        ("state", "draining", "offline"),
        ("model", "m" * 256, ""),
        ("revision", "r" * 128, "r" * 129),
        ("blocks", 4096, 4097),
        ("start", 2, 3),
        ("stop", 6, 7),
        ("stop", 1, 0),
        ("dtype", "bfloat16", "fp32"),
        ("quantize", "int8", "int4"),
        ("sessions", 0, -1),
        ("sessions", 1 << 20, (1 << 20) + 1),
        ("cache_tokens", 96, 97),
        ("cache_tokens", 0, -16),
        ("cache_size", 1 << 40, (1 << 40) + 1),
        ("page_tokens", 1, 0),
        ("page_tokens", 1 << 40, (1 << 40) + 1),
        ("session_tokens", 1 << 40, (1 << 40) + 1),
        ("session_tokens", 0, -1),
        ("step_tokens", 1 << 40, (1 << 40) + 1),
        ("step_tokens", 0, -1),
        ("queue", 1e6, 1.1e6),
        ("queue", 0.0, -0.1),
        ("seconds_per_block", 60.0, 60.1),
        ("seconds_per_block", 0.0, -0.1),
        ("prefill_seconds_per_token", 60.0, 60.1),
        ("prefill_seconds_per_token", 0.0, -0.1),
        ("name", "n" * 64, "n" * 65),
        ("name", "", None),
        ("version", "v" * 32, "v" * 33),
        ("threads", 1 << 16, (1 << 16) + 1),
        ("threads", 0, -1),
    ],
)
def test_a_peer_s_state_has_values_within_bounds_alone(key, allowed, refused):
    fields = split_message(joined(encode_info(INFO)))[0]._fields
    found = decode_info(pack_header(fields | {key: allowed}))
    assert getattr(found, key) == allowed
    with pytest.raises(MessageError):
        decode_info(pack_header(fields | {key: refused}))


@given(st.binary(min_size=3 * ROW, max_size=3 * ROW), timings)
def test_the_answer_to_a_stateless_request_comes_back_as_it_was(body, times):
    found = decode_output(joined(encode_output(Output(body, times[:1]))), ASKED)
    assert found == Output(memoryview(body), times[:1])
    failed = Failed("too_many", "wait", 1.0)
    assert decode_output(joined(encode_failed(failed)), ASKED) == failed


@pytest.mark.parametrize("push", [True, False])
def test_an_opened_and_a_close_come_back_as_they_were(push):
    assert decode_open_reply(joined(encode_opened(Opened(push)))) == Opened(push)
    assert decode_from_client(joined(encode_close()), CONTRACT) == Close()


def test_unknown_header_fields_are_ignored_so_that_a_later_version_may_add_some():
    assert decode_open(open_frame(novel=[1, 2])) == OPEN
    assert decode_from_client(step_frame(novel={"a": 1}), CONTRACT) == Step(ID, 3, 1, "all", bytes(ROW))


# (what is wrong, the frame): each is refused with a MessageError.
BAD_STEPS: dict[str, bytes] = {
    "a codec that nobody knows": step_frame(c="int3"),
    "a codec that is the session's own": step_frame(c="fp32"),
    "a packed body of another size": step_frame(bytes(CONTRACT.packed_row_bytes + 1), c="int8o"),
    "speeds below 0": step_frame(v=[-1]),
    "speeds that are no whole numbers": step_frame(v=[1.5]),
    "speeds of too many hops": step_frame(v=[1] * (MAX_HOPS + 1)),
    "nothing at all": b"",
    "no body": step_frame(b""),
    "one byte too few": step_frame(bytes(ROW - 1)),
    "one byte too many": step_frame(bytes(ROW + 1)),
    "one value": step_frame(bytes(4)),
    "one row of a batch of two": step_frame(bytes(ROW // 2)),
    "one and a half positions": step_frame(bytes(ROW * 3 // 2)),
    "half the size, as in bf16": step_frame(bytes(ROW * 3)[: ROW * 5 // 2]),
    "more positions than one step may carry": step_frame(bytes(7 * ROW), p=0),
    "more positions than the session has": step_frame(bytes(2 * ROW), p=9),
    "a position behind the end": step_frame(p=10),
    "a longer prompt than the session has": step_frame(l=11),
    "a prompt of less than nothing": step_frame(l=-1),
    "a prompt of no number": step_frame(l="x"),
    "a position far behind the end": step_frame(p=2**63),
    "a negative position": step_frame(p=-1),
    "no position": step_frame(p=...),
    "a position of nil": step_frame(p=None),
    "a position that is true": step_frame(p=True),
    "a position that is a float": step_frame(p=1.0),
    "a position that is NaN": step_frame(p=math.nan),
    "a position that is infinite": step_frame(p=math.inf),
    "a position that is text": step_frame(p="1"),
    "a position that is bytes": step_frame(p=b"\x01"),
    "a position that is a list": step_frame(p=[1]),
    "no session": step_frame(s=...),
    "another session": step_frame(s=bytes(16)),
    "a session of 15 bytes": step_frame(s=ID[:15]),
    "a session of 17 bytes": step_frame(s=ID + b"x"),
    "a session that is text": step_frame(s="0123456789abcdef"),
    "no step number": step_frame(n=...),
    "a negative step number": step_frame(n=-1),
    "a step number beyond 2^53": step_frame(n=2**53 + 1),
    "a step number that is true": step_frame(n=True),
    "a step number that is a float": step_frame(n=3.0),
    "no reply": step_frame(r=...),
    "a reply of 4": step_frame(r=4),
    "a reply of -1": step_frame(r=-1),
    "a reply that is text": step_frame(r="all"),
    "a reply that is false": step_frame(r=False),
    "timings that are a number": step_frame(t=1),
    "timings that are a map": step_frame(t={"0": 1}),
    "timings of single numbers": step_frame(t=[1, 2]),
    "timings of triples": step_frame(t=[[1, 2, 3]]),
    "timings of nothing": step_frame(t=[[]]),
    "timings that are negative": step_frame(t=[[1, -1]]),
    "timings that are floats": step_frame(t=[[1.0, 2.0]]),
    "timings that are true": step_frame(t=[[True, True]]),
    "timings that are nil": step_frame(t=[[None, None]]),
    "timings that are deep": step_frame(t=[[[1, 2], [3, 4]]]),
    "timings of more hops than there may be": step_frame(t=[[1, 1]] * (MAX_HOPS + 1)),
    "no kind": step_frame(k=...),
    "a kind of nil": step_frame(k=None),
    "an unknown kind": step_frame(k="dance"),
    "a kind that is bytes": step_frame(k=b"step"),
    "a kind that a hop sends": step_frame(k="result"),
    "a second open": open_frame(),
    "a close with a body": joined(encode_close()) + b"x",
    "a header that is a list": b"\x00\x01\x90" + bytes(ROW),
    "a header of no bytes": b"\x00\x00" + bytes(ROW),
    "a header longer than the message": b"\x0f\xff\x80" + bytes(ROW),
    "a header of 64 KiB": b"\xff\xff" + bytes(65535),
    "a header with an extension": b"\x00\x07" + msgpack.packb({"k": msgpack.ExtType(5, b"")}),
}

BAD_RESULTS: dict[str, bytes] = {
    "speeds that are no list": result_frame(v=1),
    "speeds beyond any link": result_frame(v=[1 << 41]),
    "nothing at all": b"",
    "one byte too few": result_frame(bytes(ROW - 1)),
    "one byte too many": result_frame(bytes(ROW + 1)),
    "one row of a batch of two": result_frame(bytes(ROW // 2)),
    "more positions than one step may carry": result_frame(bytes(7 * ROW), p=0),
    "more positions than the session has": result_frame(bytes(ROW), p=10),
    "a longer prompt than the session has": result_frame(l=11),
    "a position behind the end": result_frame(b"", p=11),
    "a negative position": result_frame(p=-1),
    "no position": result_frame(p=...),
    "a position that is true": result_frame(p=True),
    "a position that is a float": result_frame(p=1.0),
    "no step number": result_frame(n=...),
    "a step number that is text": result_frame(n="3"),
    "a step number beyond 2^53": result_frame(n=2**64 - 1),
    "timings that are floats": result_frame(t=[[0.5, 0.5]]),
    "timings of too many hops": result_frame(t=[[1, 1]] * (MAX_HOPS + 1)),
    "a kind that a client sends": step_frame(),
    "a kind that only answers an open": joined(encode_opened(Opened(True))),
    "a failure with a body": header_of({"k": "failed", "code": "ended", "message": "m"}, {}) + b"x",
    "a failure without a code": header_of({"k": "failed", "message": "m"}, {}),
    "a failure with an unknown code": header_of({"k": "failed", "code": "no", "message": "m"}, {}),
    "a failure with a code that is a list": header_of({"k": "failed", "code": ["ended"], "message": "m"}, {}),
    "a failure without a message": header_of({"k": "failed", "code": "ended"}, {}),
    "a failure with a long message": header_of({"k": "failed", "code": "ended", "message": "m" * 301}, {}),
    "a failure that clears the screen": header_of({"k": "failed", "code": "ended", "message": "\x1b[2J"}, {}),
    "a failure that says try again in NaN seconds": header_of(
        {"k": "failed", "code": "cache_full", "message": "m", "retry": math.nan}, {}
    ),
    "a failure that says try again in a year": header_of(
        {"k": "failed", "code": "cache_full", "message": "m", "retry": 3e7}, {}
    ),
    "a failure that says try again yesterday": header_of(
        {"k": "failed", "code": "cache_full", "message": "m", "retry": -1}, {}
    ),
    "a failure of a peer with a long name": header_of(
        {"k": "failed", "code": "ended", "message": "m", "peer": "p" * 129}, {}
    ),
    "a failure of a step that is negative": header_of(
        {"k": "failed", "code": "ended", "message": "m", "n": -1}, {}
    ),
}

BAD_OPENS: dict[str, bytes] = {
    "a body": open_frame(b"x"),
    "a kind that must not come first": step_frame(),
    "no session": open_frame(s=...),
    "a session of 8 bytes": open_frame(s=bytes(8)),
    "no model": open_frame(model=...),
    "a model of 257 characters": open_frame(model="m" * 257),
    "an empty model": open_frame(model=""),
    "a model over two lines": open_frame(model="a\nb"),
    "a revision that is bytes": open_frame(revision=b"r"),
    "a revision of 129 characters": open_frame(revision="r" * 129),
    "a negative start": open_frame(start=-1),
    "a start beyond any model": open_frame(start=MAX_BLOCKS, stop=MAX_BLOCKS + 1),
    "no block": open_frame(start=5, stop=5),
    "blocks the wrong way round": open_frame(start=5, stop=2),
    "a stop beyond any model": open_frame(stop=MAX_BLOCKS + 1),
    "a batch of none": open_frame(batch=0),
    "a batch beyond measure": open_frame(batch=MAX_TOKENS + 1),
    "a batch that is true": open_frame(batch=True),
    "a length of none": open_frame(max_length=0),
    "a length beyond measure": open_frame(max_length=2**63),
    "a dtype of another library": open_frame(dtype="complex128"),
    "a dtype with a prefix": open_frame(dtype="torch.float32"),
    "a codec that nobody knows": open_frame(codec="int3"),
    "a codec that is nil": open_frame(codec=None),
    "a codec of whole rows": open_frame(codec="int8o"),
    "a number of rows below 0": open_frame(pack=-1),
    "a predecessor that is a number": open_frame(predecessor=1),
    "a predecessor that is empty": open_frame(predecessor=""),
    "a successor with a long name": open_frame(successor="p" * 129),
    "an adapter that is a list": open_frame(adapter=["a"]),
}


BAD_REQUESTS: dict[str, bytes] = {
    "nothing at all": b"",
    "no body": request_frame(b""),
    "one byte too few": request_frame(bytes(3 * ROW - 1)),
    "one byte too many": request_frame(bytes(3 * ROW + 1)),
    "one row of a batch of two": request_frame(bytes(ROW // 2)),
    "more positions than one request may carry": request_frame(bytes(7 * ROW)),
    "more rows than one request may carry": request_frame(bytes(13 * 16), batch=13),
    "more rows than there are bytes": request_frame(batch=MAX_TOKENS),
    "a batch of none": request_frame(batch=0),
    "a batch beyond measure": request_frame(batch=MAX_TOKENS + 1),
    "a batch that is true": request_frame(batch=True),
    "half the size, as in bf16": request_frame(bytes(3 * ROW // 2)),
    "a gradient that is missing": request_frame(k="backward"),  # half of three positions is not whole
    "an odd number of bytes for two tensors": request_frame(bytes(2 * ROW + 1), k="backward"),
    "two tensors of no size": request_frame(b"", k="backward"),
    "two tensors of too many positions": request_frame(bytes(14 * ROW), k="backward"),
    "no kind": request_frame(k=...),
    "a kind of another protocol": request_frame(k="step"),
    "a kind that a server sends": request_frame(k="output"),
    "no model": request_frame(model=...),
    "a revision that is bytes": request_frame(revision=b"r"),
    "a negative start": request_frame(start=-1),
    "no block": request_frame(start=5),
    "a stop beyond any model": request_frame(stop=MAX_BLOCKS + 1),
    "a dtype of another library": request_frame(dtype="complex128"),
    "a codec that nobody knows": request_frame(codec="int3"),
    "a codec that loses": request_frame(bytes(2 * 8 * 3), codec="int8o"),
    "an adapter that is a list": request_frame(adapter=["a"]),
}

BAD_OUTPUTS: dict[str, bytes] = {
    "nothing at all": b"",
    "no body": output_frame(b""),
    "one byte too few": output_frame(bytes(3 * ROW - 1)),
    "one byte too many": output_frame(bytes(3 * ROW + 1)),
    "a position too few": output_frame(bytes(2 * ROW)),
    "a position too many": output_frame(bytes(4 * ROW)),
    "the times of two peers": output_frame(t=[[1, 1], [2, 2]]),
    "times that are floats": output_frame(t=[[1.0, 2.0]]),
    "a kind that a client sends": request_frame(),
    "a result": result_frame(bytes(3 * ROW)),
    "a failure with a body": header_of({"k": "failed", "code": "ended", "message": "m"}, {}) + b"x",
}


@pytest.mark.parametrize("wrong", BAD_REQUESTS)
def test_a_request_that_is_not_whole_or_too_large_is_refused(wrong):
    with pytest.raises(MessageError):
        read_request(BAD_REQUESTS[wrong])


@pytest.mark.parametrize("wrong", BAD_OUTPUTS)
def test_an_output_of_another_size_than_asked_for_is_refused(wrong):
    with pytest.raises(MessageError):
        decode_output(BAD_OUTPUTS[wrong], ASKED)


@pytest.mark.parametrize("wrong", BAD_STEPS)
def test_a_step_that_the_contract_does_not_allow_is_refused(wrong):
    with pytest.raises(MessageError):
        decode_from_client(BAD_STEPS[wrong], CONTRACT)


@pytest.mark.parametrize("wrong", BAD_RESULTS)
def test_a_result_that_the_contract_does_not_allow_is_refused(wrong):
    with pytest.raises(MessageError):
        decode_from_hop(BAD_RESULTS[wrong], CONTRACT)


@pytest.mark.parametrize("wrong", BAD_OPENS)
def test_an_open_that_no_hop_could_want_is_refused(wrong):
    with pytest.raises(MessageError):
        decode_open(BAD_OPENS[wrong])


@pytest.mark.parametrize("push", [..., None, 1, 0, "true", []])
def test_an_opened_says_true_or_false(push):
    with pytest.raises(MessageError):
        decode_open_reply(header_of({"k": "opened"}, {"push": push}))


def test_the_tables_begin_from_frames_that_are_right():
    assert decode_from_client(step_frame(), CONTRACT) == Step(ID, 3, 1, "all", bytes(ROW))
    assert decode_from_hop(result_frame(), CONTRACT) == Result(3, 1, bytes(ROW))
    assert decode_open(open_frame()) == OPEN
    assert read_request(request_frame()) == (Forward(RUN, bytes(3 * ROW)), ASKED)
    assert decode_output(output_frame(), ASKED) == Output(bytes(3 * ROW))
    backward = read_request(request_frame(bytes(6 * ROW), k="backward"))
    assert backward == (Backward(RUN, bytes(3 * ROW), bytes(3 * ROW)), ASKED)
    run, prompts = replace(RUN, prompts=2), bytes(3 * 2 * ROW // 2)  # of three blocks, for all rows
    asked = read_request(request_frame(bytes(3 * ROW) + prompts, prompts=2))
    assert asked == (Forward(run, bytes(3 * ROW), prompts), ASKED)
    asked = read_request(request_frame(bytes(6 * ROW) + prompts, k="backward", prompts=2))
    assert asked == (Backward(run, bytes(3 * ROW), bytes(3 * ROW), prompts), ASKED)


def test_the_limits_of_a_contract_are_reached_and_not_passed():
    assert CONTRACT.row_bytes == ROW
    assert replace(CONTRACT, codec="bf16").row_bytes == ROW // 2
    assert CONTRACT.max_tokens == 6  # 12 tokens in rows of 2
    assert replace(CONTRACT, max_length=4).max_tokens == 4
    assert replace(CONTRACT, max_step_tokens=1).max_tokens == 1
    for position, tokens in [(0, 6), (4, 6), (9, 1)]:
        found = decode_from_client(step_frame(bytes(tokens * ROW), p=position), CONTRACT)
        assert len(found.body) == tokens * ROW
    assert decode_from_hop(result_frame(b"", p=10), CONTRACT) == Result(3, 10, b"")


READERS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "open": (decode_open, [open_frame(predecessor="a", successor="b", adapter="c")]),
    "open's answer": (decode_open_reply, [joined(encode_opened(Opened(True)))]),
    "from a client": (
        lambda frame: decode_from_client(frame, CONTRACT),
        [step_frame(t=[[1, 2], [3, 4]]), joined(encode_close())],
    ),
    "from a hop": (
        lambda frame: decode_from_hop(frame, CONTRACT),
        [result_frame(t=[[1, 2]]), joined(encode_failed(Failed("ended", "over", 1.0, 2, "p")))],
    ),
    "a push": (
        lambda frame: read_step(read_message(frame, frozenset({"step"})), CONTRACT),
        [step_frame(bytes(2 * ROW))],
    ),
    "a stateless request": (
        read_request,
        [
            request_frame(adapter="a"),
            request_frame(bytes(6 * ROW), k="backward"),
            request_frame(bytes(4 * ROW + ROW // 2), prompts=1),
            request_frame(tape=bytes(16), k="backward"),
        ],
    ),
    "a question for a peer's state": (decode_describe, [joined(encode_describe())]),
    "a peer's state": (decode_info, [joined(encode_info(INFO))]),
    "a stateless request's answer": (
        lambda frame: decode_output(frame, ASKED),
        [output_frame(t=[[1, 2]]), joined(encode_failed(Failed("ended", "over", 1.0, 2, "p")))],
    ),
}


@pytest.mark.parametrize("reader", READERS)
@given(frame=st.binary(max_size=120))
def test_of_any_bytes_comes_a_message_or_a_message_error(reader, frame):
    with contextlib.suppress(MessageError):
        READERS[reader][0](frame)


@pytest.mark.parametrize("reader", READERS)
def test_of_a_good_frame_with_any_one_byte_changed_or_cut_comes_a_message_or_a_message_error(reader):
    read, frames = READERS[reader]
    for frame in frames:
        most = {"open": len(frame), "a stateless request": 100}.get(reader, 60)
        header = min(len(frame), most)  # the body's bytes are all alike
        for at in range(header):
            for value in {0, 0x7F, 0x80, 0xC0, 0xC1, 0xD6, 0xFF, frame[at] ^ 1, frame[at] ^ 0x80}:
                changed = bytearray(frame)
                changed[at] = value
                for one in (changed, changed[: at + 1], changed + b"\x00"):
                    with contextlib.suppress(MessageError):
                        read(bytes(one))


@given(st.data())
def test_the_fields_of_a_message_may_hold_anything_and_only_message_errors_escape(data):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    )
    value = data.draw(anything)
    field = data.draw(
        st.sampled_from(["k", "model", "revision", "start", "stop", "batch", "dtype", "codec", "prompts"])
    )
    with contextlib.suppress(MessageError):
        read_request(request_frame(**{field: value}))
    field = data.draw(st.sampled_from(["k", "s", "n", "p", "r", "t"]))
    with contextlib.suppress(MessageError):
        decode_output(output_frame(**{field: value}), ASKED)
    for frame, read in (
        (step_frame(**{field: value}), lambda f: decode_from_client(f, CONTRACT)),
        (result_frame(**{field: value}), lambda f: decode_from_hop(f, CONTRACT)),
    ):
        with contextlib.suppress(MessageError):
            read(frame)


@pytest.mark.parametrize(
    "error",
    [
        Refused("no", 1.0),
        CacheFull("full", 2.0),
        TooManyStreams("many"),
        WrongRevision("other"),
        Draining("leaving", 0.0),
        RemoteProtocolError("not now"),
        MessageError("unreadable"),
        BadResult("NaN"),
        PeerGone("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_told_is_the_same_kind_of_error_where_it_is_read(error):
    told = decode_from_hop(joined(encode_failed(Failed.of(error, 4, "p"))), CONTRACT)
    assert (told.step, told.peer) == (4, "p")
    read = told.error()
    assert type(read) is type(error)
    assert str(read) == str(error)
    assert getattr(read, "retry_after_seconds", None) == getattr(error, "retry_after_seconds", None)


def every_kind(base: type) -> list[type]:
    return [base, *(kind for child in base.__subclasses__() for kind in every_kind(child))]


def test_every_fault_and_every_refusal_that_there_is_can_be_told():
    import node.model.blocks.kv_pages  # noqa: F401  has a refusal of its own

    for kind in every_kind(PeerFault) + every_kind(Refused):
        told = decode_from_hop(joined(encode_failed(Failed.of(kind("a reason")))), CONTRACT)
        assert issubclass(kind, Refused) == isinstance(told.error(), Refused), kind
        assert str(told.error()) == "a reason"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PeerGone("idle"), "ended"),
        (SlowPeer("late"), "ended"),
        (FrameError("garbage"), "message"),
        (NotAMember("stranger"), "message"),
    ],
)
def test_a_session_that_is_over_is_told_as_ended_and_not_as_a_push_that_failed(error, code):
    assert Failed.of(error).code == code


@given(st.text())
def test_whatever_the_reason_is_its_telling_can_be_read(text):
    told = decode_from_hop(joined(encode_failed(Failed.of(PeerGone(text)))), CONTRACT)
    assert told.message
    assert len(told.message) <= 300


@given(st.integers(0, 100), st.integers(1, 100), replies)
def test_what_a_reply_covers_is_the_end_of_its_step(position, tokens, reply):
    what = StepRange(position, tokens, reply)
    assert what.reply_tokens == {"all": tokens, "last": 1, "none": 0, "replay": 0}[reply]
    assert what.reply_position + what.reply_tokens == position + tokens


def test_a_failure_has_a_printable_text_of_three_hundred_characters():
    assert Failed.of(PeerGone("one\ntwo\x1b[31m")).message == "one two [31m"
    assert Failed.of(PeerGone("x" * 299)).message == "x" * 299
    assert Failed.of(PeerGone("x" * 301)).message == "x" * 300
    assert Failed.of(PeerGone("")).message == "PeerGone"


def whole_number(most: int):
    return st.one_of(st.integers(-1, most + 1), st.sampled_from([True, None, 1.0, "1"]))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": whole_number(3),
            "p": whole_number(10),
            "r": whole_number(3),
            "e": whole_number(2),
            "t": st.one_of(
                st.lists(st.lists(whole_number(2), min_size=1, max_size=3), max_size=2),
                st.sampled_from([None, [[1, 2]] * MAX_HOPS, 7, "ab"]),
            ),
            "b": st.booleans(),
            "l": whole_number(10),
            "w": st.sampled_from([b"\0\1\0\0", b"", 1]),
            "o": st.sampled_from([b"owner-id", 1]),
            "later": st.integers(0, 9),
        },
    ),
    st.sampled_from([0, ROW // 2, ROW, 2 * ROW]),
)
def test_a_token_read_in_one_pass_is_what_is_read_field_by_field(fields, size):
    frame = step_frame(bytes(size), **fields)
    message = read_message(frame, frozenset({"step"}))

    def read(one_pass: bool):
        with pytest.MonkeyPatch.context() as patch:
            if not one_pass:
                patch.setattr("tensor_codec.messages.session._read_token", lambda *_: None)
            try:
                return read_step(message, CONTRACT)
            except MessageError as error:
                return str(error)

    assert read(True) == read(False)


def test_the_usual_token_is_read_in_one_pass(monkeypatch):
    message = read_message(step_frame(bytes(ROW), t=[[1, 2]], e=1, o=b"owner-id"), frozenset({"step"}))
    monkeypatch.setattr("tensor_codec.header.Header.integer", None)
    assert read_step(message, CONTRACT).timings == ((1, 2),)
