"""Frames: whatever the split, whatever the bytes."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensor_codec.errors import FrameError, LocalProtocolError
from tensor_codec.frame import PREFIX_BYTES, FrameDecoder, encode_frame
from tensor_codec.limits import KIB, MIB

LIMIT = 64
payloads = st.lists(st.binary(max_size=LIMIT))


def fed_in_pieces(decoder: FrameDecoder, wire: bytes, data: st.DataObject) -> list[bytearray]:
    frames = []
    while wire:
        cut = data.draw(st.integers(1, len(wire)))
        frames += decoder.feed(wire[:cut])
        wire = wire[cut:]
    return frames


def read_whole(wire: bytes, max_frame: int = LIMIT) -> list[bytearray]:
    decoder = FrameDecoder(max_frame)
    frames = decoder.feed(wire)
    decoder.close()
    return frames


@given(payloads, st.data())
def test_any_split_gives_the_same_frames(payloads, data):
    decoder = FrameDecoder(LIMIT)
    frames = fed_in_pieces(decoder, b"".join(map(encode_frame, payloads)), data)
    decoder.close()
    assert frames == payloads


@given(st.binary(max_size=400), st.data())
def test_of_any_bytes_come_the_same_frames_or_the_same_error_whatever_the_split(wire, data):
    def outcome(pieces: bool) -> object:
        decoder = FrameDecoder(LIMIT)
        try:
            frames = fed_in_pieces(decoder, wire, data) if pieces else decoder.feed(wire)
            decoder.close()
        except FrameError as error:
            return str(error)
        return frames

    assert outcome(pieces=True) == outcome(pieces=False)


@given(st.lists(st.binary(max_size=LIMIT), min_size=1), st.data())
def test_a_stream_with_bytes_changed_raises_nothing_but_frame_errors(payloads, data):
    wire = bytearray(b"".join(map(encode_frame, payloads)))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        frames = read_whole(bytes(wire))
    except FrameError:
        return
    assert b"".join(map(encode_frame, frames)) == wire


@given(st.lists(st.binary(max_size=LIMIT), min_size=1), st.data())
def test_a_stream_that_ends_inside_a_frame_is_an_error_and_one_that_ends_between_frames_is_none(
    payloads, data
):
    wire = b"".join(map(encode_frame, payloads))
    ends = [0]
    for payload in payloads:
        ends.append(ends[-1] + PREFIX_BYTES + len(payload))
    cut = data.draw(st.integers(0, len(wire)))
    if cut in ends:
        assert read_whole(wire[:cut]) == payloads[: ends.index(cut)]
    else:
        with pytest.raises(FrameError, match="ended inside a frame"):
            read_whole(wire[:cut])


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 20, 16 * MIB + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_hostile_length_is_refused_on_sight_of_its_prefix(size):
    decoder, prefix = FrameDecoder(LIMIT), size.to_bytes(4, "big")
    assert decoder.feed(prefix[:3]) == []
    with pytest.raises(FrameError, match=f"{size} bytes was announced, {LIMIT} are allowed"):
        decoder.feed(prefix[3:])


def test_after_an_error_every_later_call_raises_it_again():
    decoder = FrameDecoder(LIMIT)
    with pytest.raises(FrameError) as first:
        decoder.feed(b"\xff" * 4)
    for call in (lambda: decoder.feed(encode_frame(b"good")), decoder.close, lambda: decoder.feed(b"")):
        with pytest.raises(FrameError, match=str(first.value)):
            call()


def test_the_largest_frame_is_accepted_and_one_byte_more_is_not():
    assert read_whole(encode_frame(bytes(LIMIT))) == [bytes(LIMIT)]
    with pytest.raises(FrameError):
        read_whole(encode_frame(bytes(LIMIT + 1)))


def test_an_empty_payload_is_a_frame_too():
    assert read_whole(encode_frame(b"") * 3) == [b"", b"", b""]


def test_the_decoder_knows_how_much_of_a_frame_is_missing():
    decoder, wire = FrameDecoder(LIMIT), encode_frame(b"0123456789")
    assert not decoder.in_frame
    for received in range(1, len(wire)):
        assert decoder.feed(wire[received - 1 : received]) == []
        assert decoder.in_frame
        assert decoder.missing_bytes == (0 if received < PREFIX_BYTES else len(wire) - received)
    assert decoder.feed(wire[-1:]) == [b"0123456789"]
    assert not decoder.in_frame
    assert decoder.missing_bytes == 0


def test_each_frame_has_memory_of_its_own():
    decoder = FrameDecoder(LIMIT)
    data = bytearray(encode_frame(b"one") + encode_frame(b"two"))
    one, two = decoder.feed(data)
    views = memoryview(one), memoryview(two)
    data[:] = bytes(len(data))
    decoder.feed(encode_frame(b"three"))
    assert [bytes(view) for view in views] == [b"one", b"two"]


def test_the_announced_length_alone_takes_no_memory():
    decoder = FrameDecoder(16 * MIB)
    tracemalloc.start()
    try:
        decoder.feed((16 * MIB).to_bytes(4, "big") + b"only this came")
        assert tracemalloc.get_traced_memory()[1] < 64 * KIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [7, 1000, 64 * KIB])
def test_a_frame_in_pieces_takes_at_most_three_times_its_size(piece):
    size = 256 * KIB
    wire, decoder = encode_frame(bytes(size)), FrameDecoder(size)
    tracemalloc.start()
    try:
        for begin in range(0, len(wire), piece):
            frames = decoder.feed(wire[begin : begin + piece])
        assert tracemalloc.get_traced_memory()[1] <= 64 * KIB + 3 * size
    finally:
        tracemalloc.stop()
    assert frames == [bytes(size)]


@given(st.lists(st.binary(max_size=20)))
@settings(max_examples=30)
def test_a_frame_of_parts_is_the_frame_of_the_whole(parts):
    views = [memoryview(part) if len(part) % 2 else bytearray(part) for part in parts]
    assert encode_frame(views) == encode_frame(b"".join(parts))


def test_sending_more_than_was_agreed_is_our_own_bug():
    assert encode_frame(bytes(10), max_frame=10)
    with pytest.raises(LocalProtocolError, match="11 bytes, where 10 are allowed"):
        encode_frame([bytes(10), b"x"], max_frame=10)
