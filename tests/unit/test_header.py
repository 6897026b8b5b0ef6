"""Message headers: bombs, wrong types and noise end in a MessageError, quickly and in little memory."""

import contextlib
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensor_codec.errors import LocalProtocolError, MessageError
from tensor_codec.header import MAX_ITEMS, Header, pack_header, split_message, unpack_map
from tensor_codec.limits import KIB, MAX_HEADER_BYTES, MIB


def framed(packed: bytes) -> bytes:
    return len(packed).to_bytes(2, "big") + packed


def repeated(unit: bytes, end: bytes = b"") -> bytes:
    """As many units as fit into a header."""
    return unit * ((MAX_HEADER_BYTES - len(end)) // len(unit)) + end


def map_of(value: bytes) -> bytes:
    return b"\x81\xa1k" + value


BOMBS = {
    "nothing": b"",
    "array instead of map": msgpack.packb([1, 2]),
    "nil": b"\xc0",
    "integer": b"\x07",
    "text": msgpack.packb("k"),
    "the reserved byte": b"\xc1",
    "array of empty maps": b"\xdc" + struct.pack(">H", 4093) + b"\x80" * 4093,
    "array of empty arrays": b"\xdc" + struct.pack(">H", 4093) + b"\x90" * 4093,
    "array of nil": b"\xdc" + struct.pack(">H", 4093) + b"\xc0" * 4093,
    "map of empty maps": map_of(b"\xdc" + struct.pack(">H", 4000) + b"\x80" * 4000),
    "nested arrays of one": repeated(b"\x91", b"\xc0"),
    "nested maps of one": repeated(b"\x81\xa0", b"\xc0"),
    "nested maps as keys": repeated(b"\x81"),
    "nested arrays of 15": repeated(b"\x9f"),
    "nested arrays, each announced long": repeated(b"\xdc\x0f\xff"),
    "nested arrays in a map, each announced long": map_of(b"\xdc\x0f\x00" * 1300),
    "nested maps, each announced long": repeated(b"\xde\x07\xff\xa0"),
    "nested maps announced at half the size": repeated(b"\xde\x08\x00\xa0"),
    "announced text of 4 GiB": map_of(b"\xdb\xff\xff\xff\xff"),
    "announced bytes of 4 GiB": map_of(b"\xc6\xff\xff\xff\xff"),
    "announced array of 4 G": map_of(b"\xdd\xff\xff\xff\xff"),
    "announced map of 4 G": b"\xdf\xff\xff\xff\xff",
    "announced map of 64 K": b"\xde\xff\xff",
    "announced extension of 4 GiB": map_of(b"\xc9\xff\xff\xff\xff\x05"),
    "extension of 1 byte": map_of(b"\xd4\x05x"),
    "extension of 16 bytes": map_of(b"\xd8\x05" + bytes(16)),
    "extension of no bytes": map_of(b"\xc7\x00\x05"),
    "extension instead of a map": b"\xc7\x00\x05",
    "many extensions of no bytes": map_of(b"\xdc\x05\x00" + b"\xc7\x00\x05" * 0x500),
    "nested extensions": map_of(b"\xc7\x0a\x05" + b"\xc7\x07\x05" + b"\xc7\x04\x05" + b"\xc7\x01\x05x"),
    "timestamp of 4 bytes": map_of(b"\xd6\xff" + bytes(4)),
    "timestamp of 8 bytes": map_of(b"\xd7\xff" + bytes(8)),
    "timestamp of 12 bytes": map_of(b"\xc7\x0c\xff" + bytes(12)),
    "timestamp of no bytes": map_of(b"\xc7\x00\xff"),
    "timestamp as a key": b"\x81\xd6\xff" + bytes(4) + b"\x01",
    "duplicate keys": b"\x82\xa1k\x01\xa1k\x02",
    "duplicate keys further in": map_of(b"\x82\xa1k\x01\xa1k\x02"),
    "integer key": b"\x81\x01\x02",
    "bool key": b"\x81\xc3\x02",
    "nil key": b"\x81\xc0\x02",
    "float key": b"\x81\xcb" + struct.pack(">d", math.nan) + b"\x02",
    "bytes key": b"\x81\xc4\x01k\x02",
    "array key": b"\x81\x90\x02",
    "map key": b"\x81\x80\x02",
    "integer key further in": map_of(b"\x81\x01\x02"),
    "text that is not UTF-8": map_of(b"\xa2\xff\xfe"),
    "text that is a surrogate": map_of(b"\xa3\xed\xa0\x80"),
    "key that is not UTF-8": b"\x81\xa2\xff\xfe\x01",
    "cut short": msgpack.packb({"k": "step", "n": 1})[:-1],
    "something behind it": msgpack.packb({"k": 1}) + b"\xc0",
    "two maps": b"\x80\x80",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_a_message_error_and_costs_less_than_a_mebibyte(name):
    frame = framed(BOMBS[name])
    assert len(frame) <= MAX_HEADER_BYTES + 2
    tracemalloc.start()
    try:
        with pytest.raises(MessageError) as caught:
            split_message(frame)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) <= 300


def test_a_header_may_not_be_larger_than_4_kib_whatever_is_in_it():
    most = msgpack.packb({"k": bytes(MAX_HEADER_BYTES - 6)})
    assert len(most) == MAX_HEADER_BYTES
    assert len(split_message(framed(most))[0].binary("k", MAX_HEADER_BYTES - 6)) == MAX_HEADER_BYTES - 6
    with pytest.raises(MessageError, match="4097 bytes, 4096 are allowed"):
        split_message(framed(msgpack.packb({"k": bytes(MAX_HEADER_BYTES - 5)})))


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x00\x02\x80", b"\xff\xff", b"\x10\x00" + bytes(100)])
def test_a_header_longer_than_its_message_is_refused(frame):
    with pytest.raises(MessageError):
        split_message(frame)


@given(st.binary(max_size=200))
@example(b"\x00\x01\x80")
@example(b"\x00\x00")
def test_of_any_bytes_comes_a_header_or_a_message_error(frame):
    try:
        header, body = split_message(frame)
    except MessageError:
        return
    assert isinstance(header, Header)
    assert frame.endswith(bytes(body))


@given(st.binary(max_size=200))
def test_of_any_bytes_unpacked_comes_a_map_with_text_keys_or_a_message_error(data):
    try:
        fields = unpack_map(data)
    except MessageError:
        return
    assert all(type(key) is str for key in fields)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=8), plain, max_size=6), st.binary(max_size=50))
def test_a_header_and_its_body_come_back_as_they_were(fields, body):
    frame = pack_header(fields) + body
    header, found = split_message(frame)
    assert bytes(found) == body
    assert repr(header._fields) == repr(fields)  # by their text, for NaN is not equal to itself


@given(st.dictionaries(st.text(max_size=8), plain, max_size=6), st.data())
def test_a_header_with_bytes_changed_is_a_header_or_a_message_error(fields, data):
    frame = bytearray(pack_header(fields) + b"body")
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        split_message(frame)


def test_the_body_is_a_view_and_nothing_of_it_is_copied():
    frame = bytearray(pack_header({"k": 1}) + bytes(MIB))
    tracemalloc.start()
    try:
        _, body = split_message(frame)
        assert tracemalloc.get_traced_memory()[1] < 64 * KIB
    finally:
        tracemalloc.stop()
    frame[-1] = 7
    assert body[-1] == 7


def test_a_list_or_a_map_may_have_64_items():
    for value in (list(range(MAX_ITEMS)), {str(n): n for n in range(MAX_ITEMS)}):
        assert split_message(pack_header({"k": value}))[0]._fields == {"k": value}
    for value in (list(range(MAX_ITEMS + 1)), {str(n): n for n in range(MAX_ITEMS + 1)}):
        with pytest.raises(MessageError):
            split_message(pack_header({"k": value}))


def test_packing_more_than_a_header_holds_is_our_own_bug():
    with pytest.raises(LocalProtocolError):
        pack_header({"k": bytes(MAX_HEADER_BYTES)})


# What each reader takes and what it does not.
READERS: dict[str, tuple[Callable[[Header], object], list[Any]]] = {
    "integer": (lambda h: h.integer("x", 0, 10), [0, 5, 10]),
    "number": (lambda h: h.number("x", 0.0, 10.0), [0, 0.5, 10, 10.0]),
    "flag": (lambda h: h.flag("x"), [True, False]),
    "text": (lambda h: h.text("x", 5), ["a", "b", "c", "äöü✓😀"]),
    "choice": (lambda h: h.choice("x", frozenset({"a", "b"})), ["a", "b"]),
    "binary": (lambda h: h.binary("x", 3), [b"abc"]),
    "items": (lambda h: h.items("x", 2), [[], [1, "a"]]),
    "mapping": (lambda h: h.mapping("x", 1), [{}, {"a": 1}]),
}
VALUES = [
    *(None, True, False, 0, 5, 10, -1, 11, 2**63, 2**64 - 1, -(2**63), 0.5, 10.0, 10.1, -0.1, 1e308),
    *(math.nan, math.inf, -math.inf, "", "a", "b", "c", "äöü✓😀", "sixsix", "a\nb", "a\x00", "\u202e"),
    *(b"", b"a", b"abc", b"abcd", [], [1, "a"], [1, 2, 3], {}, {"a": 1}, {"a": 1, "b": 2}, "x" * 1000),
]


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_its_own_values_and_nothing_else(reader):
    read, good = READERS[reader]
    for value in cast(list[Any], VALUES):
        header = Header({"x": value})
        in_range = reader == "number" and type(value) in (int, float) and 0 <= value <= 10
        short = reader == "items" and type(value) is list and len(value) <= 2
        if in_range or short or any(type(value) is type(one) and value == one for one in good):
            assert read(header) == value
        else:
            with pytest.raises(MessageError) as caught:
                read(header)
            assert str(caught.value).startswith("x is ")
            assert len(str(caught.value)) < 300
    with pytest.raises(MessageError, match="x is None"):
        read(Header({}))


def test_a_number_is_always_a_float():
    assert type(Header({"x": 3}).number("x", 0, 10)) is float


def test_a_field_of_nil_is_a_field_that_is_not_there():
    assert "x" not in Header({"x": None})
    assert "x" not in Header({})
    assert "x" in Header({"x": False})


def test_empty_text_is_taken_where_it_is_allowed():
    assert Header({"x": ""}).text("x", empty=True) == ""


ANY_READERS: dict[str, Callable[[Header], object]] = {
    "text": lambda header: header.text("k", 32),
    "integer": lambda header: header.integer("k", 0, 9),
    "number": lambda header: header.number("k", 0.0, 9.0),
    "flag": lambda header: header.flag("k"),
    "binary": lambda header: header.binary("k", 16),
    "mapping": lambda header: header.mapping("k", 0),
}


@pytest.mark.parametrize("reader", ANY_READERS)
@pytest.mark.parametrize("depth", [1, 10, 500, 900, 990, 1000, 1010, 1020, 1024, 2000, 4000])
@pytest.mark.parametrize("unit", [b"\x91", b"\x81\xa1k"])
def test_a_value_that_is_nested_to_any_depth_ends_in_a_message_error(reader: str, depth: int, unit: bytes):
    packed = map_of((unit * depth)[: MAX_HEADER_BYTES - 8] + b"\xc0")
    with pytest.raises(MessageError) as refused:
        ANY_READERS[reader](split_message(framed(packed))[0])
    assert len(str(refused.value)) < 300
