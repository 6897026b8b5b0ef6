"""Hidden states on the wire: what each codec keeps, and what never travels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.codecs import WIRE_DTYPES, decode_hidden, decode_rows, encode_hidden, pack, recode
from tensor_codec.errors import BadResult, LocalProtocolError
from tensor_codec.messages.contract import (
    CODECS,
    VALUE_BYTES,
    Contract,
    codec_for,
    vector_bytes,
)

HIDDEN = 6
LARGEST_BF16 = torch.finfo(torch.bfloat16).max


def contract(codec: str, batch: int = 1, hidden: int = HIDDEN) -> Contract:
    return Contract(bytes(16), 0, 1, batch, 100, hidden, codec, 2048)


def there_and_back(hidden: torch.Tensor, codec: str) -> torch.Tensor:
    body = bytes(encode_hidden(hidden, codec))
    terms = contract(codec, hidden.shape[0], hidden.shape[2])
    assert len(body) == hidden.shape[1] * terms.row_bytes
    return decode_hidden(body, terms)


values = st.floats(-LARGEST_BF16, LARGEST_BF16, width=32)
tensors = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float32).reshape(shape)
    )
)


@given(tensors)
def test_fp32_is_exact(hidden):
    found = there_and_back(hidden, "fp32")
    assert found.dtype == torch.float32
    assert torch.equal(found, hidden)


@given(tensors)
def test_bf16_is_within_one_part_in_256(hidden):
    found = there_and_back(hidden, "bf16")
    assert found.dtype == torch.bfloat16
    normal = hidden.abs() >= torch.finfo(torch.bfloat16).tiny  # below it there are fewer bits
    error = (found.double() - hidden.double()).abs()
    assert (error[normal] <= hidden.double().abs()[normal] * 2**-8).all()
    assert (error[~normal] <= 2.0**-133).all()


@given(tensors)
def test_bf16_loses_nothing_of_what_was_bf16(hidden):
    hidden = hidden.bfloat16()
    assert torch.equal(there_and_back(hidden, "bf16"), hidden)
    assert torch.equal(there_and_back(hidden, "fp32").bfloat16(), hidden)


def test_fp32_keeps_outliers_that_float16_could_not_hold():
    hidden = torch.full((1, 1, HIDDEN), 98_561.0)
    assert torch.equal(there_and_back(hidden, "fp32"), hidden)
    assert torch.isfinite(there_and_back(hidden, "bf16")).all()


@pytest.mark.parametrize("codec", sorted(VALUE_BYTES))
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 7, 3 * 4 * HIDDEN - 1])
def test_a_value_that_is_not_finite_is_refused_on_the_way_out_and_on_the_way_in(codec, bad, at):
    hidden = torch.ones(3, 4, HIDDEN)
    body = bytearray(encode_hidden(hidden, codec))
    hidden.view(-1)[at] = bad
    with pytest.raises(BadResult, match="computed"):
        encode_hidden(hidden, codec)
    size = VALUE_BYTES[codec]
    body[at * size : (at + 1) * size] = bytes(
        torch.tensor([bad], dtype=WIRE_DTYPES[codec]).view(torch.uint8).tolist()
    )
    with pytest.raises(BadResult, match="received"):
        decode_hidden(body, contract(codec, 3))


def test_two_infinities_do_not_cancel_out():
    hidden = torch.zeros(1, 1, HIDDEN)
    hidden[0, 0, 0], hidden[0, 0, 1] = math.inf, -math.inf
    with pytest.raises(BadResult):
        encode_hidden(hidden, "fp32")


def test_a_value_too_large_for_bf16_is_refused_and_does_not_travel_as_infinity():
    with pytest.raises(BadResult):
        encode_hidden(torch.full((1, 1, HIDDEN), torch.finfo(torch.float32).max), "bf16")


def test_the_largest_values_are_finite_although_their_sum_is_not():
    hidden = torch.full((1, 50, HIDDEN), torch.finfo(torch.float32).max)
    assert torch.equal(there_and_back(hidden, "fp32"), hidden)


@given(st.binary(max_size=200))
def test_of_any_bytes_come_finite_values_or_a_bad_result(data):
    for codec, packed in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
        terms = contract(codec)
        row_bytes = terms.packed_row_bytes if packed else terms.row_bytes
        body = data[: len(data) // row_bytes * row_bytes]
        try:
            hidden = decode_hidden(body, terms, packed=packed)
        except BadResult:
            continue
        assert hidden.shape == (1, len(body) // row_bytes, HIDDEN)
        assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("codec", sorted(VALUE_BYTES))
@pytest.mark.parametrize("offset", range(8))
def test_a_body_may_begin_anywhere_in_its_frame(codec, offset):
    hidden = torch.arange(2.0 * HIDDEN).reshape(1, 2, HIDDEN)
    frame = bytearray(bytes(offset) + bytes(encode_hidden(hidden, codec)))
    found = decode_hidden(memoryview(frame)[offset:], contract(codec))
    assert torch.equal(found.float(), hidden)
    assert found.data_ptr() % 16 == 0


@pytest.mark.parametrize("codec", sorted(VALUE_BYTES))
def test_what_is_decoded_has_memory_of_its_own(codec):
    hidden = torch.ones(1, 2, HIDDEN)
    frame = bytearray(encode_hidden(hidden, codec))
    found = decode_hidden(frame, contract(codec))
    frame[:] = bytes(len(frame))
    assert torch.equal(found.float(), hidden)
    found.zero_()


@pytest.mark.parametrize("codec", sorted(VALUE_BYTES))
def test_hidden_states_need_not_lie_in_one_piece(codec):
    whole = torch.arange(2.0 * 5 * HIDDEN).reshape(2, 5, HIDDEN)
    for part in (whole[:, 3:], whole[:, ::2], whole.transpose(0, 1)[1:3], whole[:, -1:].double().half()):
        assert torch.equal(there_and_back(part, codec).float(), part.float())


def test_hidden_states_with_a_gradient_can_be_sent():
    hidden = torch.ones(1, 1, HIDDEN, requires_grad=True)
    assert torch.equal(there_and_back(hidden, "fp32"), hidden)


def test_an_unchecked_body_at_the_codec_is_our_own_bug():
    with pytest.raises(LocalProtocolError):
        decode_hidden(bytes(3), contract("fp32"))


@pytest.mark.parametrize(
    ("dtypes", "codec"),
    [
        ({"bfloat16"}, "bf16"),
        ({"float32"}, "fp32"),
        ({"float16"}, "fp32"),
        ({"float32", "bfloat16"}, "fp32"),
        ({"float16", "bfloat16"}, "fp32"),
    ],
)
def test_the_codec_is_the_smallest_that_loses_nothing(dtypes, codec):
    assert codec_for(frozenset(dtypes)) == codec


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_a_body_in_another_codec_is_what_would_have_been_encoded_so(values):
    hidden = torch.tensor(values).clamp(-LARGEST_BF16, LARGEST_BF16)[None, :, None]
    wide, narrow = (bytes(encode_hidden(hidden, codec)) for codec in ("fp32", "bf16"))
    assert recode(wide, "fp32", "bf16", 1) == narrow
    anywhere = memoryview(b"x" + narrow)[1:]
    assert recode(anywhere, "bf16", "fp32", 1) == encode_hidden(hidden.bfloat16(), "fp32")
    assert recode(wide, "fp32", "fp32", 1) is wide


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_packed_body_keeps_the_values_that_arrive(codec):
    torch.manual_seed(3)
    hidden = torch.randn(2, 3, 64) * 10.0 ** torch.randint(-3, 4, (2, 3, 64))
    terms, body = contract(codec, 2, 64), encode_hidden(hidden, codec)
    both = pack(body, codec, 64)
    assert len(both.wire) == 3 * terms.packed_row_bytes
    arrived = decode_hidden(both.wire, terms, packed=True)
    assert arrived.dtype == WIRE_DTYPES[codec]
    assert torch.equal(arrived, decode_hidden(both.kept, terms))
    assert not torch.equal(arrived, decode_hidden(body, terms))
    if codec == "fp32":  # what the client keeps goes out again as it was
        assert recode(both.kept, "fp32", "int8o", 64) == both.wire


@given(st.sampled_from(sorted(CODECS)), st.sampled_from(sorted(CODECS)))
def test_a_change_of_codec_that_keeps_values_keeps_them(codec, to):
    torch.manual_seed(5)
    body = bytes(encode_hidden(torch.randn(1, 4, 64) * 9, codec))
    other = recode(body, codec, to, 64)
    assert len(other) == 4 * vector_bytes(to, 64)
    before, after = (decode_rows(*each, 64) for each in ((body, codec), (other, to)))
    if to in (codec, "fp32"):
        assert torch.equal(before.float(), after.float())
