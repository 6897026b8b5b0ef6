"""Offers, needs, parts of blobs and sums as bytes: what went in comes out, and nothing else gets in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.adapters import AdapterContent, AdapterManifest, LoraSite
from tensor_codec.blocks import Blocks
from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer
from tensor_codec.header import pack_header, split_message
from tensor_codec.limits import Limits
from tensor_codec.messages import adapter, gradients
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.forward_backward import Backward, Request, Run, decode_request, encode_request
from tensor_codec.span_spec import SpanSpec

LIMITS = Limits()
SITES = (LoraSite("q_proj", 2, 0.5),)
OWN = AdapterContent(AdapterManifest("r", "fp32", (SITES, (), SITES)), (b"12345678", b"", b"87654321"))
RUN = Blocks(0, 3)
SPEC = SpanSpec("m", "r", RUN, "float32", OWN.id)
OFFER = adapter.Offer(SPEC, OWN.manifest, OWN.digests)


def frame(parts: Sequence[Buffer]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def offered(**changes: object) -> bytes:
    header, body = split_message(frame(adapter.encode_offer(OFFER)))
    return pack_header(header._fields | changes) + bytes(body)


def test_an_offer_comes_out_as_it_went_in():
    found = adapter.decode_offer(offered())
    assert isinstance(found, adapter.OfferFrame)
    assert found.name == OWN.id
    assert found.checked(LIMITS, 3) == OFFER
    assert adapter.decode_offer(frame(list(adapter.encode_drop(adapter.Drop(OWN.id))))) == adapter.Drop(
        OWN.id
    )


def test_an_offer_fits_into_the_frame_that_a_server_reads():
    assert len(offered()) <= adapter.offer_bytes(LIMITS, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "0" * 64}, f"offered as {'0' * 64}, its content is {OWN.id}"),
        ({"revision": "x"}, "an adapter of revision r for x"),
    ],
)
def test_an_offer_of_another_content_is_refused(changes: dict[str, object], words: str):
    found = adapter.decode_offer(offered(**changes))
    assert isinstance(found, adapter.OfferFrame)
    with pytest.raises(MessageError, match=words):
        found.checked(LIMITS, 3)


@pytest.mark.parametrize("name", ["poems", "F" * 64, "0" * 63, ""])
def test_an_adapter_is_offered_and_dropped_by_its_id(name: str):
    with pytest.raises(MessageError):
        adapter.decode_offer(offered(adapter=name))
    with pytest.raises(MessageError):
        adapter.decode_offer(pack_header({"k": "drop", "adapter": name}))


def test_an_offer_without_hashes_or_with_half_of_one_is_refused():
    whole = offered()
    for wrong in (whole[:-1], whole + b"\0", whole[: -32 * 3]):
        with pytest.raises(MessageError):
            adapter.decode_offer(wrong)
    found = adapter.decode_offer(whole[:-32])
    assert isinstance(found, adapter.OfferFrame)
    with pytest.raises(MessageError, match="64 bytes of digests for 3 blocks"):
        found.checked(LIMITS, 3)


def test_an_offer_for_another_number_of_blocks_is_refused_before_it_is_hashed(
    monkeypatch: pytest.MonkeyPatch,
):
    def hashed(*_: object) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(adapter, "adapter_id", hashed)
    found = adapter.decode_offer(offered())
    assert isinstance(found, adapter.OfferFrame)
    with pytest.raises(MessageError, match="an adapter of 3 blocks, 2 are needed"):
        found.checked(LIMITS, 2)


@given(st.integers(0, 100), st.sets(st.integers(0, 79), min_size=1), st.integers(0, 1 << 40))
def test_a_need_names_its_blocks_in_order(start: int, places: set[int], room: int):
    run = Blocks(start, start + 80)
    wanted = adapter.Need(tuple(sorted(start + place for place in places)), room)
    assert adapter.decode_need_or_held(frame(list(adapter.encode_need(wanted, run))), run) == wanted


@pytest.mark.parametrize("marks", [b"", b"\0", b"\x08", b"\1\0"])
def test_a_need_of_no_block_or_of_others_is_refused(marks: bytes):
    with pytest.raises(MessageError):
        adapter.decode_need_or_held(pack_header({"k": "need", "blocks": marks, "room": 1}), RUN)


def test_a_blob_goes_in_parts_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter, "PIECE_BYTES", 3)
    parts = adapter.pieces(2, OWN.blobs[2])
    assert [(part.at, bytes(part.data)) for part in parts] == [(0, b"876"), (3, b"543"), (6, b"21")]
    assert adapter.pieces(1, b"") == []
    wire = frame(list(adapter.encode_blob_part(parts[1])))
    assert adapter.decode_blob_part(wire, 5) == adapter.BlobPart(2, 3, memoryview(b"543"))
    for rest in (0, 2):
        with pytest.raises(MessageError, match="3 bytes of a blob"):
            adapter.decode_blob_part(wire, rest)


def test_a_backward_names_its_sum_and_a_forward_has_none():
    run = Run(SPEC, 1, "fp32", summed=gradients.Summed(b"s" * 16, 9))
    wire = frame(list(encode_request(Backward(run, b"1234", b"5678"))))
    found = decode_request(wire)
    assert isinstance(found, Request)
    assert found.run == run
    header, body = split_message(wire)
    forward = decode_request(pack_header(header._fields | {"k": "forward"}) + bytes(body))
    assert isinstance(forward, Request)
    assert forward.run.summed is None
    for wrong in ({"sum": b"s"}, {"n": -1}, {"n": gradients.MAX_SUMMED}):
        with pytest.raises(MessageError):
            decode_request(pack_header(header._fields | wrong) + bytes(body))


@given(st.frozensets(st.integers(0, gradients.MAX_SUMMED - 1)), st.integers(1, 40))
def test_a_sum_says_which_requests_are_in_it(numbers: frozenset[int], size: int):
    wire = frame(list(gradients.encode_gradients(numbers, 0, bytes(size))))
    found = gradients.decode_gradients(wire, 0, size)
    assert isinstance(found, gradients.GradientPart)
    assert (found.numbers, found.at, bytes(found.data)) == (numbers, 0, bytes(size))


def test_parts_of_a_sum_come_in_order_and_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients, "GRADIENT_PIECE_BYTES", 4)
    parts = [(start, b"0123456789"[start:stop]) for start, stop in gradients.gradient_ranges(10)]
    assert parts == [(0, b"0123"), (4, b"4567"), (8, b"89")]
    wires = [frame(list(gradients.encode_gradients(frozenset({0}), at, data))) for at, data in parts]
    for (at, data), wire in zip(parts, wires, strict=True):
        found = gradients.decode_gradients(wire, at, 10)
        assert isinstance(found, gradients.GradientPart)
        assert bytes(found.data) == data
    for wire, at, size in ((wires[1], 0, 10), (wires[0], 0, 3), (wires[2], 8, 11)):
        with pytest.raises(MessageError):
            gradients.decode_gradients(wire, at, size)


READERS: dict[str, Callable[[bytes], object]] = {
    "offer": adapter.decode_offer,
    "block": lambda wire: adapter.decode_blob_part(wire, 8),
    "need": lambda wire: adapter.decode_need_or_held(wire, RUN),
    "held": adapter.decode_held,
    "gradients": lambda wire: gradients.decode_gradients(wire, 0, 8),
}


@pytest.mark.parametrize("reader", READERS)
@given(data=st.binary(max_size=80))
def test_any_bytes_are_a_message_or_a_fault(reader: str, data: bytes):
    with suppress(MessageError):
        READERS[reader](data)


@given(st.binary(max_size=300))
def test_any_manifest_is_one_or_a_fault(data: bytes):
    with pytest.raises(MessageError):
        adapter.OfferFrame(SPEC, data, b"".join(OWN.digests)).checked(LIMITS, 3)


def test_a_refusal_is_read_in_place_of_an_answer():
    wire = frame(list(encode_failed(Failed("no_adapter", "offer it"))))
    for reader in ("need", "held", "gradients"):
        assert READERS[reader](wire) == Failed("no_adapter", "offer it")
