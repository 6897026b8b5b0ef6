"""What a seeder answers, and how little a peer can have of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import trio

from node.network.sharing.seeder import Seeder
from routing.names import PeerId
from routing.sharing.cards import verify_card
from tensor_codec.adapters import AdapterContent
from tensor_codec.blocks import Blocks
from tensor_codec.errors import FrameError, MessageError, PeerFault, PeerGone, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import MIB
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.sharing import (
    AskBlobs,
    AskCards,
    AskManifest,
    CardsPage,
    Question,
    SharedManifest,
    decode_content,
    decode_page,
    decode_shared_part,
    encode_question,
)
from tests.adapter_fixtures import content
from tests.fakes_serving import FakeStream, stream_pair
from tests.sharing_fixtures import LIMITS, seeder

OWN = content(2, empty=(1,))


class Served:
    """A seeder, and streams to it."""

    def __init__(self, nursery: trio.Nursery, one: Seeder) -> None:
        self.nursery, self.seeder = nursery, one
        self.faults: list[PeerFault] = []

    def stream(self, peer: str = "guest", prefix: str = "", frames: int = 16) -> FakeStream:
        limits = self.seeder.limits
        ours, theirs = stream_pair(PeerId(peer), PeerId("seeder"), ADAPTER_PROTOCOL, limits, frames)
        theirs.prefix = prefix
        self.nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: FakeStream) -> None:
        try:
            await self.seeder.serve(stream)
            await stream.aclose()
        except PeerFault as fault:
            self.faults.append(fault)
            await stream.reset()


async def ask(stream: FakeStream, question: Question) -> Buffer:
    await stream.send(encode_question(question))
    return await answer(stream)


async def answer(stream: FakeStream) -> Buffer:
    with trio.fail_after(1000):
        frame = await stream.receive()
    assert frame is not None
    return frame


async def test_cards_manifest_and_blobs_come_over_one_stream(autojump_clock: object, nursery: trio.Nursery):
    served = Served(nursery, seeder(OWN))
    stream = served.stream()
    page = decode_page(await ask(stream, AskCards("r")), LIMITS)
    assert isinstance(page, CardsPage)
    assert [verify_card(wire, LIMITS).id for wire in page.cards] == [OWN.id]
    found = decode_content(await ask(stream, AskManifest(OWN.id)), OWN.id, LIMITS)
    assert found == SharedManifest(OWN.manifest, OWN.digests)
    await stream.send(encode_question(AskBlobs(OWN.id, Blocks(0, 3))))
    for block in (0, 2):  # block 1 has no site
        part = decode_shared_part(await answer(stream), len(OWN.blobs[block]))
        assert not isinstance(part, Failed)
        assert (part.block, part.at, bytes(part.data)) == (block, 0, OWN.blobs[block])
    assert served.faults == []


async def test_a_page_has_64_cards_at_most_and_the_next_one_goes_on_behind_it(
    autojump_clock: object, nursery: trio.Nursery
):
    owns = [content(seed=number) for number in range(11)]  # their values repeat after 11 seeds
    served = Served(nursery, seeder(*owns, limits=replace(LIMITS, max_adapter_cards_per_page=4)))
    stream, after, found = served.stream(), "", list[str]()
    for expected in (4, 4, 3):
        page = decode_page(await ask(stream, AskCards("r", after)), LIMITS)
        assert isinstance(page, CardsPage)
        assert len(page.cards) == expected
        assert page.has_more == (expected == 4)
        found += [verify_card(wire, LIMITS).id for wire in page.cards]
        after = found[-1]
    assert found == sorted(own.id for own in owns)


async def test_what_is_not_given_is_refused_and_the_stream_goes_on(
    autojump_clock: object, nursery: trio.Nursery
):
    served = Served(nursery, seeder(OWN))
    stream = served.stream()
    for question in (
        AskManifest("0" * 64),
        AskBlobs("0" * 64, Blocks(0, 1)),
        AskBlobs(OWN.id, Blocks(0, 7)),
    ):
        refused = decode_shared_part(await ask(stream, question), 1)
        assert isinstance(refused, Failed)
        assert refused.code == "refused"
    assert isinstance(decode_page(await ask(stream, AskCards("other")), LIMITS), CardsPage)
    assert served.faults == []


@pytest.mark.parametrize("size", [5000, MIB])
async def test_a_question_is_small(autojump_clock: object, nursery: trio.Nursery, size: int):
    served = Served(nursery, seeder(OWN))
    await served.stream().send(bytes(size))
    await trio.sleep(1)
    assert [type(fault) for fault in served.faults] == [FrameError]


async def test_what_is_no_question_ends_the_stream(autojump_clock: object, nursery: trio.Nursery):
    served = Served(nursery, seeder(OWN))
    await served.stream().send(b"\0\0")
    await trio.sleep(1)
    assert [type(fault) for fault in served.faults] == [MessageError]


async def test_a_silent_stream_ends(autojump_clock: object, nursery: trio.Nursery):
    served = Served(nursery, seeder(OWN))
    quiet, asked = served.stream(), served.stream()
    await ask(asked, AskManifest(OWN.id))
    begin = trio.current_time()
    assert await quiet.receive() is None
    assert trio.current_time() - begin == pytest.approx(LIMITS.frame_start_seconds, abs=0.1)
    assert await asked.receive() is None
    assert trio.current_time() - begin == pytest.approx(LIMITS.compute_idle_seconds, abs=0.1)
    assert served.faults == []


def large(blocks: int = 4, size: int = 4 * MIB) -> AdapterContent:
    own = content(blocks=blocks)
    return AdapterContent(own.manifest, tuple(bytes([block]) * size for block in range(blocks)))


async def taken(stream: FakeStream, own: AdapterContent, left: int | None = None) -> int:
    """Ask for all blobs and take them, or `left` bytes; the bytes that came."""
    await stream.send(encode_question(AskBlobs(own.id, Blocks(0, len(own.blobs)))))
    size = 0
    while size < (own.nbytes if left is None else left):
        part = decode_shared_part(await answer(stream), 1 << 30)
        assert not isinstance(part, Failed), part
        size += len(part.data)
    return size


async def test_downloads_keep_to_the_rate_of_all(autojump_clock: object, nursery: trio.Nursery):
    own = large(12)
    served = Served(nursery, seeder(own))
    begin = trio.current_time()
    async with trio.open_nursery() as both:
        for peer in "ab":
            both.start_soon(taken, served.stream(peer), own)
    seconds = trio.current_time() - begin
    over = 2 * own.nbytes - LIMITS.adapter_seed_burst_bytes
    assert seconds == pytest.approx(over / LIMITS.adapter_seed_bytes_per_second, rel=0.05)


async def test_a_third_download_of_a_peer_is_refused_with_a_time(
    autojump_clock: object, nursery: trio.Nursery
):
    own = large()
    served = Served(nursery, seeder(own))
    streams = [served.stream(frames=1) for _ in range(3)]
    for stream in streams[:2]:
        await taken(stream, own, left=1)
    assert served.seeder.downloads.count == 2
    refused = decode_shared_part(await ask(streams[2], AskBlobs(own.id, Blocks(0, 1))), 1)
    assert isinstance(refused, Failed)
    assert (refused.code, refused.retry_after_seconds) == ("too_many", 2.0)
    assert await streams[2].receive() is None


async def test_a_peer_that_takes_nothing_loses_its_place(autojump_clock: object, nursery: trio.Nursery):
    own = large()
    served = Served(nursery, seeder(own))
    await served.stream(frames=1).send(encode_question(AskBlobs(own.id, Blocks(0, 4))))
    await trio.sleep(1)
    assert served.seeder.downloads.count == 1
    await trio.sleep(LIMITS.reply_taken_seconds)
    assert served.seeder.downloads.count == 0
    assert [type(fault) for fault in served.faults] == [SlowPeer]


async def test_a_peer_that_takes_a_little_now_and_then_loses_its_place_too(
    autojump_clock: object, nursery: trio.Nursery
):
    own = large()
    served = Served(nursery, seeder(own))
    stream = served.stream(frames=1)
    await stream.send(encode_question(AskBlobs(own.id, Blocks(0, 4))))
    seconds = LIMITS.adapter_upload_seconds + own.nbytes / LIMITS.frame_floor_bytes_per_second
    with trio.move_on_after(seconds + 20) as scope:
        with suppress(PeerGone):
            while True:
                await answer(stream)
                await trio.sleep(LIMITS.reply_taken_seconds * 0.9)
    assert not scope.cancelled_caught
    await trio.sleep(1)
    assert "has not taken" in str(served.faults[0])


async def test_a_network_with_most_downloads_gives_one_up(autojump_clock: object, nursery: trio.Nursery):
    own = large()
    served = Served(nursery, seeder(own, limits=replace(LIMITS, max_adapter_downloads=2)))
    crowd = [served.stream(peer, "8.8.8.8/32", frames=1) for peer in "ab"]
    for stream in crowd:
        await taken(stream, own, left=1)
    other = served.stream("c", "9.9.9.9/32")
    assert await taken(other, own) == own.nbytes
    await trio.sleep(0.1)
    assert [each.peer for each in served.seeder.downloads._under_way] == ["a"]


async def test_questions_of_a_peer_keep_to_their_rate(autojump_clock: object, nursery: trio.Nursery):
    served = Served(nursery, seeder(OWN))
    stream = served.stream()
    begin = trio.current_time()
    for _ in range(LIMITS.adapter_offers_burst + 8):
        await ask(stream, AskManifest(OWN.id))
    assert trio.current_time() - begin == pytest.approx(8 / LIMITS.adapter_offers_per_second, abs=0.3)
