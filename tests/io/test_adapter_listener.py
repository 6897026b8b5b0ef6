"""What a node takes of a guest's adapter; everything else gets one line, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import trio
import trio.testing

from node.runtime.faults import Faults
from node.serving.adapters.desk import AdapterDesk
from node.serving.adapters.listener import AdapterListener
from node.serving.adapters.store import manifest_bytes
from node.serving.span_admission import SpanAdmission
from routing.names import PeerId
from tensor_codec.adapters import AdapterContent, AdapterManifest, LoraSite, adapter_id
from tensor_codec.blocks import Blocks
from tensor_codec.errors import MessageError, PeerFault, PeerGone, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import MIB, Limits
from tensor_codec.messages.adapter import (
    ADAPTER_PROTOCOL,
    BlobPart,
    Drop,
    HeldAdapter,
    Need,
    Offer,
    decode_held,
    decode_need_or_held,
    encode_blob_part,
    encode_drop,
    encode_offer,
    pieces,
)
from tensor_codec.messages.fields import Failed
from tensor_codec.span_spec import SpanSpec
from tests.adapter_fixtures import SITES, a_desk, content, prefix, shapes
from tests.fakes_serving import HIDDEN, FakeCompute, FakeStream, stream_pair

RUN = Blocks(1, 4)
SPEC = SpanSpec("m", "r", RUN, "float32", hidden=HIDDEN, max_position=512)


@dataclass
class Server:
    """A node's entry for adapters, and streams to it."""

    nursery: trio.Nursery
    limits: Limits
    desk: AdapterDesk
    listener: AdapterListener

    def stream(self, peer: str = "guest", prefix: str = "") -> FakeStream:
        """A stream of a peer, served as the host does."""
        ours, theirs = stream_pair(PeerId(peer), PeerId("server"), ADAPTER_PROTOCOL, self.limits)
        theirs.prefix = prefix
        self.nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: FakeStream) -> None:
        try:
            await self.listener.serve(stream)
            await stream.aclose()
        except PeerFault as fault:
            self.listener.faults.add(stream.peer, fault)
            await stream.reset()

    def faults(self) -> dict[tuple[str, str], int]:
        """The faults of peers that were counted, by peer and kind."""
        return self.listener.faults.counts()

    @property
    def kept(self) -> int:
        """Bytes of blobs that guests hold here."""
        claims = self.desk.store.claims
        return claims.used - sum(each.overhead for each in claims._claims.values())


@asynccontextmanager
async def server(
    limits: Limits | None = None, capacity: int = MIB, read: Callable[..., object] | None = None
) -> AsyncIterator[Server]:
    limits = limits or Limits()
    desk = a_desk(limits, capacity=capacity)
    if read is not None:
        desk = replace(desk, read=read)
    known = shapes(*RUN)
    admission = SpanAdmission(SPEC, adapters=desk.store)
    listener = AdapterListener(admission, desk, lambda: known, FakeCompute(), limits, Faults(limits))
    async with trio.open_nursery() as nursery:
        yield Server(nursery, limits, desk, listener)
        nursery.cancel_scope.cancel()


def offered(own: AdapterContent, run: Blocks = RUN, **changes: object) -> list[Buffer]:
    spec = replace(SPEC, blocks=run, adapter=own.id, hidden=0, max_position=0)
    return encode_offer(Offer(replace(spec, **changes), own.manifest, own.digests))  # type: ignore[arg-type]


async def answer(stream: FakeStream, run: Blocks = RUN) -> Need | HeldAdapter | Failed:
    with trio.fail_after(100):
        frame = await stream.receive()
    assert frame is not None
    return decode_need_or_held(frame, run)


async def bring(stream: FakeStream, own: AdapterContent, run: Blocks = RUN) -> HeldAdapter | Failed:
    """Offer an adapter, and send what the server needs."""
    await stream.send(offered(own, run))
    found = await answer(stream, run)
    if not isinstance(found, Need):
        return found
    for block in found.blocks:
        for part in pieces(block, own.blobs[block]):
            await stream.send(encode_blob_part(part))
    with trio.fail_after(100):
        frame = await stream.receive()
    assert frame is not None
    return decode_held(frame)


async def test_an_adapter_is_brought_once_and_then_held(autojump_clock: object) -> None:
    async with server() as one:
        own, stream = content(2), one.stream()
        assert await bring(stream, own) == HeldAdapter(600.0)
        with one.desk.store.using("guest", own.id, RUN, trio.current_time) as hop:
            assert (hop.id, sorted(hop.blocks), hop.rank) == (own.id, [1, 2, 3], 2)
        assert one.kept == sum(len(own.blobs[block]) for block in range(*RUN))
        await stream.send(offered(own))
        assert await answer(stream) == HeldAdapter(600.0)  # at once
        assert one.faults() == {}


async def test_a_server_asks_for_the_blocks_that_it_lacks_and_no_others(autojump_clock: object) -> None:
    async with server() as one:
        own, stream = content(), one.stream()
        assert isinstance(await bring(stream, own, Blocks(2, 3)), HeldAdapter)
        await stream.send(offered(own))
        needed = await answer(stream)
        assert isinstance(needed, Need)
        assert needed.blocks == (1, 3)
        assert needed.room == MIB // 4


async def test_a_peer_cannot_find_out_what_another_has_brought(autojump_clock: object) -> None:
    async with server() as one:
        own = content()
        await bring(one.stream("a"), own)
        other = one.stream("b")
        await other.send(offered(own))
        needed = await answer(other)
        assert isinstance(needed, Need)
        assert needed.blocks == (1, 2, 3)


async def test_an_adapter_counts_with_its_manifest(autojump_clock: object) -> None:
    size = 3 * len(OWN.blobs[1]) + manifest_bytes(OWN.manifest)
    async with server(capacity=4 * size) as one:
        for number in range(6):  # each has the share of one such adapter
            found = await bring(one.stream(f"guest {number}"), content(seed=number))
            assert isinstance(found, HeldAdapter)
        assert one.desk.store.claims.used == 4 * size


async def test_blocks_without_sites_need_no_bytes(autojump_clock: object) -> None:
    async with server() as one:
        own = content(empty=(1, 3))
        assert isinstance(await bring(one.stream(), own), HeldAdapter)
        nothing = content(empty=range(6))
        assert isinstance(await bring(one.stream(), nothing), HeldAdapter)
        with one.desk.store.using("guest", nothing.id, RUN, trio.current_time) as hop:
            assert hop.rank == 0


async def test_a_dropped_adapter_is_gone(autojump_clock: object) -> None:
    async with server() as one:
        own, stream = content(), one.stream()
        await bring(stream, own)
        await stream.send(encode_drop(Drop(own.id)))
        await trio.testing.wait_all_tasks_blocked()
        assert one.kept == 0
        assert isinstance(await bring(stream, own), HeldAdapter)  # the stream goes on


def with_id(own: AdapterContent, manifest: AdapterManifest) -> AdapterContent:
    return AdapterContent(manifest, own.blobs)


OWN = content()
HIGH = AdapterManifest("r", "fp32", tuple((LoraSite("q_proj", HIDDEN + 1, 1.0),) for _ in range(6)))
UNKNOWN = AdapterManifest("r", "fp32", tuple((LoraSite("experts", 1, 1.0),) for _ in range(6)))
REFUSED = {
    "another revision": (content(revision="x"), {"revision": "x"}, "wrong_revision", "revision x of m"),
    "blocks that are not served": (OWN, {"blocks": Blocks(0, 4)}, "wrong_revision", "blocks 0:4 were asked"),
    "another dtype": (OWN, {"dtype": "bfloat16"}, "wrong_revision", "dtype bfloat16"),
    "a site that the blocks lack": (with_id(OWN, UNKNOWN), {}, "refused", "site 'experts'"),
    "a rank above a linear's smaller side": (with_id(OWN, HIGH), {}, "refused", f"rank {HIDDEN + 1}"),
    "a prefix": (
        prefix(), {}, "refused", "a prefix: the cache of this model's blocks takes none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
async def test_what_does_not_fit_is_refused_before_a_byte_is_taken(what: str, autojump_clock: object) -> None:
    own, changes, code, words = REFUSED[what]
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(own, **changes))  # type: ignore[arg-type]
        found = await answer(stream)
        assert isinstance(found, Failed)
        assert found.code == code
        assert words in found.message
        assert one.kept == 0
        assert one.faults() == {}
        assert isinstance(await bring(stream, content(1)), HeldAdapter)  # the stream goes on


WRONG = {
    "an id of another content": (OWN, {"adapter": "0" * 64}, "its content is"),
    "another revision than its model's": (content(revision="x"), {}, "of revision x for r"),
    "an adapter of another number of blocks": (content(blocks=5), {}, "5 blocks, 6 are needed"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_an_offer_that_contradicts_itself_ends_the_stream(what: str, autojump_clock: object) -> None:
    own, changes, words = WRONG[what]
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(own, **changes))  # type: ignore[arg-type]
        found = await answer(stream)
        assert isinstance(found, Failed)
        assert (found.code, words in found.message) == ("message", True)
        assert await stream.receive() is None
        assert one.faults() == {("guest", "MessageError"): 1}
        assert one.kept == 0


NAN, INFINITE, LARGE = float("nan"), float("inf"), 1.1e4
SPOILT = {
    "NaN": (content(values=[NAN] * 8), "NaN or infinity"),
    "infinity": (content(values=[0.0] * 7 + [INFINITE]), "NaN or infinity"),
    "a value beyond the largest": (content(values=[LARGE] * 8), "10000 is the largest allowed"),
}


@pytest.mark.parametrize("what", SPOILT)
async def test_values_that_spoil_a_sum_are_not_kept(what: str, autojump_clock: object) -> None:
    own, words = SPOILT[what]
    async with server() as one:
        stream = one.stream()
        found = await bring(stream, own)
        assert isinstance(found, Failed)
        assert words in found.message
        assert await stream.receive() is None
        assert one.kept == 0
        assert one.faults() == {("guest", "MessageError"): 1}


async def test_a_blob_with_another_hash_is_not_kept(autojump_clock: object) -> None:
    async with server() as one:
        own, stream = content(), one.stream()
        await stream.send(offered(own))
        await answer(stream)
        await stream.send(encode_blob_part(BlobPart(1, 0, bytes(len(own.blobs[1])))))
        found = await answer(stream)
        assert isinstance(found, Failed)
        assert found.message == "the blob of block 1 has another hash than was offered"
        assert one.kept == 0
        assert one.faults() == {("guest", "ForgedContent"): 1}
        assert one.listener.faults.banned_seconds("guest") > 30, "no network changes a hash"


ORDERS = {
    "another block": BlobPart(2, 0, OWN.blobs[2]),
    "another place": BlobPart(1, 4, OWN.blobs[1][4:]),
}


@pytest.mark.parametrize("what", ORDERS)
async def test_parts_come_in_order(what: str, autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(OWN))
        await answer(stream)
        await stream.send(encode_blob_part(ORDERS[what]))
        found = await answer(stream)
        assert isinstance(found, Failed)
        assert found.code == "protocol"
        assert one.kept == 0
        assert one.faults() == {("guest", "RemoteProtocolError"): 1}


async def test_a_blob_is_no_longer_than_was_offered(autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(OWN))
        await answer(stream)
        await stream.send(encode_blob_part(BlobPart(1, 0, OWN.blobs[1] + b"\0")))
        found = await answer(stream)
        assert isinstance(found, Failed)
        assert (found.code, found.message) == ("message", "33 bytes of a blob, 1..32 are allowed now")
        assert one.kept == 0


async def test_half_an_upload_ends_at_its_deadline_and_gives_its_bytes_back(autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(OWN))
        assert isinstance(await answer(stream), Need)
        await stream.send(encode_blob_part(BlobPart(1, 0, OWN.blobs[1])))
        await trio.testing.wait_all_tasks_blocked()
        assert one.kept == 3 * len(OWN.blobs[1])
        began = trio.current_time()
        with pytest.raises(PeerGone):
            await stream.receive()
        assert 30 <= trio.current_time() - began <= 31
        assert one.faults() == {("guest", SlowPeer.__name__): 1}
        assert one.kept == len(OWN.blobs[1])  # the block that came is sound: its upload may go on
        assert one.desk.uploads.count == 0


async def test_an_upload_that_is_cut_off_goes_on_where_it_was(autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await stream.send(offered(OWN))
        await answer(stream)
        await stream.send(encode_blob_part(BlobPart(1, 0, OWN.blobs[1])))
        await trio.testing.wait_all_tasks_blocked()
        await stream.reset()
        again = one.stream()
        await again.send(offered(OWN))
        needed = await answer(again)
        assert isinstance(needed, Need)
        assert needed.blocks == (2, 3)


async def test_a_peer_that_offers_for_ever_is_slowed(autojump_clock: object) -> None:
    async with server() as one:
        stream, began = one.stream(), trio.current_time()
        for _ in range(one.limits.adapter_offers_burst + 20):  # a training with an adapter in every step
            assert isinstance(await bring(stream, OWN), HeldAdapter)
        assert trio.current_time() - began == pytest.approx(20 / one.limits.adapter_offers_per_second)
        assert one.faults() == {}


async def test_a_peer_with_offers_on_many_streams_is_refused_and_not_blamed(autojump_clock: object) -> None:
    async with server(Limits(adapter_offers_burst=1)) as one:
        streams = [one.stream() for _ in range(10)]
        for stream in streams:
            await stream.send(offered(content(revision="x"), revision="x"))
        found = [(await answer(stream), stream) for stream in streams]
        refused = [stream for said, stream in found if isinstance(said, Failed) and said.code == "too_many"]
        assert len(refused) == 1
        assert await refused[0].receive() is None
        assert one.faults() == {}


async def test_an_adapter_larger_than_a_peer_s_share_is_refused(autojump_clock: object) -> None:
    size = 3 * len(OWN.blobs[1]) + manifest_bytes(OWN.manifest)
    async with server(capacity=4 * size - 4) as one:
        found = await bring(one.stream(), OWN)
        assert isinstance(found, Failed)
        assert (found.code, "are allowed here" in found.message) == ("refused", True)
        assert one.desk.uploads.count == 0


async def test_uploads_of_a_crowd_give_way_to_another_address(autojump_clock: object) -> None:
    limits = Limits(max_adapter_uploads=2)
    async with server(limits) as one:
        crowd = []
        for number in range(2):
            stream = one.stream(f"crowd{number}", "198.51.100.1/32")
            await stream.send(offered(OWN))
            assert isinstance(await answer(stream), Need)
            crowd.append(stream)
        found = await bring(one.stream("home", "192.0.2.1/32"), OWN)
        assert isinstance(found, HeldAdapter)
        said = await answer(crowd[1])
        assert isinstance(said, Failed)
        assert (said.code, said.retry_after_seconds) == ("too_many", 2.0)
        assert one.faults() == {}


async def test_uploads_beyond_their_rate_are_read_later(autojump_clock: object) -> None:
    size = sum(len(OWN.blobs[block]) for block in range(*RUN))
    limits = Limits(adapter_upload_burst_bytes=1, adapter_upload_bytes_per_second=size)
    async with server(limits) as one:
        began = trio.current_time()
        assert isinstance(await bring(one.stream(), OWN), HeldAdapter)
        assert 0.9 <= trio.current_time() - began <= 1.1


async def test_uploads_are_read_slowly_while_clients_of_other_prefixes_decode(autojump_clock: object) -> None:
    size = sum(len(OWN.blobs[block]) for block in range(*RUN))
    limits = Limits(
        adapter_upload_burst_bytes=1,
        adapter_upload_bytes_per_second=size,
        adapter_upload_burst_bytes_beside_steps=1,
        adapter_upload_bytes_per_second_beside_steps=size // 4,
    )
    for peer, where, seconds in (("guest", "203.0.113.1/32", 1), ("home", "192.0.2.1/32", 4)):
        async with server(limits) as one:
            one.listener.others_decode = lambda party: party != "203.0.113.1/32"
            began = trio.current_time()
            assert isinstance(await bring(one.stream(peer, where), OWN), HeldAdapter)
            assert seconds - 0.4 <= trio.current_time() - began <= seconds + 0.1


async def test_bytes_that_are_no_message_reset_the_stream(autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await stream.send(b"nonsense")
        with pytest.raises(PeerGone):
            await stream.receive()
        assert one.faults() == {("guest", MessageError.__name__): 1}


async def test_an_idle_stream_is_closed(autojump_clock: object) -> None:
    async with server() as one:
        stream = one.stream()
        await bring(stream, OWN)
        began = trio.current_time()
        assert await stream.receive() is None
        assert trio.current_time() - began == one.limits.compute_idle_seconds


def test_sites_of_the_fixtures_are_those_of_the_manifests() -> None:
    assert adapter_id(OWN.manifest, OWN.digests) == OWN.id
    assert {site.name for block in OWN.manifest.blocks for site in block} <= set(SITES)
