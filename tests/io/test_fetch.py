"""Looking for shared adapters and fetching them, from seeders that are honest, slow, gone or liars."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio

from client.sharing.catalogue import CARDS_SECONDS
from client.sharing.fetch import STALL_SECONDS, Fetch, fetch
from node.config import ConfigError
from node.network.transport.identity import identity_of
from routing.names import PeerId
from tensor_codec.adapters import AdapterManifest
from tensor_codec.errors import PeerGone, Refused, TooManyStreams
from tensor_codec.messages.adapter import BlobPart, encode_blob_part
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.sharing import (
    AskBlobs,
    AskManifest,
    CardsPage,
    decode_question,
    encode_content,
    encode_page,
    shared_pieces,
)
from tests.adapter_fixtures import content
from tests.fakes_serving import FakeStream
from tests.sharing_fixtures import LIMITS, Peers, peers, seeder, signed, sizes_of, wanted

OWN = content(2, names=("q_proj", "v_proj"), empty=(1,))
OTHER = content(2, names=("q_proj", "v_proj"), empty=(1,), seed=3)


class Liar:
    """A seeder of OWN that does one thing wrong.  blobs: what it sends for each block."""

    def __init__(self, blobs: Sequence[bytes] = OWN.blobs, stop: int = 99, seconds: float = 0.0) -> None:
        self.blobs, self.stop, self.seconds = blobs, stop, seconds
        self.asked: list[object] = []

    async def __call__(self, stream: FakeStream) -> None:
        while (frame := await stream.receive()) is not None:
            question = decode_question(frame)
            self.asked.append(question)
            await self.answer(stream, question)

    async def answer(self, stream: FakeStream, question: object) -> None:
        match question:
            case AskManifest():
                await stream.send(encode_content(OWN.manifest, OWN.digests))
            case AskBlobs(_, blocks):
                for block in range(*blocks):
                    if block == self.stop:
                        await trio.sleep_forever()
                    for part in self.parts(block):
                        await trio.sleep(self.seconds)
                        await stream.send(encode_blob_part(part))

    def parts(self, block: int) -> Iterator[BlobPart]:
        return shared_pieces(block, self.blobs[block])


async def test_an_adapter_is_found_and_fetched(autojump_clock: object):
    async with peers() as some:
        a, b = (some.add(name, seeder(OWN, OTHER).serve) for name in "ab")
        found = await some.sharing.catalogue("r")
        assert {each.card.id: each.seeders for each in found} == {OWN.id: (a, b), OTHER.id: (a, b)}
        one = next(each for each in found if each.card.id == OWN.id)
        assert await fetch(some.sharing, one, sizes_of) == OWN
        assert some.faults == []


async def test_a_seeder_without_a_card_of_its_own_is_found_by_the_adapter_s_key(autojump_clock: object):
    async with peers() as some:
        some.add("a", seeder(OWN).serve)
        assert await fetch(some.sharing, wanted(OWN), sizes_of) == OWN


async def test_wrong_bytes_cost_a_liar_its_place_and_nothing_of_them_stays(autojump_clock: object):
    async with peers() as some:
        blobs = [bytes(len(blob)) if block == 3 else blob for block, blob in enumerate(OWN.blobs)]
        liar = some.add("a liar", Liar(blobs))
        good = some.add("good", seeder(OWN).serve)
        assert await fetch(some.sharing, wanted(OWN, liar, good), sizes_of) == OWN
        assert some.opened == [liar, good]


async def test_blobs_that_have_come_stay_when_a_seeder_stalls(autojump_clock: object):
    async with peers() as some:
        stalls, rest = Liar(stop=3), Liar()
        slow, good = some.add("slow", stalls), some.add("good", rest)
        begin = trio.current_time()
        assert await fetch(some.sharing, wanted(OWN, slow, good), sizes_of) == OWN
        assert trio.current_time() - begin == pytest.approx(STALL_SECONDS, abs=1)
        assert [each.blocks for each in rest.asked if isinstance(each, AskBlobs)] == [(3, 6)]
        assert not any(isinstance(each, AskManifest) for each in rest.asked)


async def test_a_seeder_that_drips_has_the_time_of_the_slowest_rate(autojump_clock: object):
    class Drips(Liar):
        def parts(self, block: int) -> Iterator[BlobPart]:
            blob = self.blobs[block]
            return (BlobPart(block, at, blob[at : at + 1]) for at in range(len(blob)))

    async with peers() as some:
        slow = some.add("slow", Drips(seconds=STALL_SECONDS - 1))
        good = some.add("good", seeder(OWN).serve)
        begin = trio.current_time()
        assert await fetch(some.sharing, wanted(OWN, slow, good), sizes_of) == OWN
        assert trio.current_time() - begin == pytest.approx(LIMITS.adapter_upload_seconds, abs=2)


async def test_content_of_another_id_is_not_taken(autojump_clock: object):
    class Another(Liar):
        async def answer(self, stream: FakeStream, question: object) -> None:
            await stream.send(encode_content(OTHER.manifest, OTHER.digests))

    async with peers() as some:
        liar = some.add("a liar", Another())
        with pytest.raises(
            PeerGone, match=f"no peer gave .*a liar: adapter {OWN.id} was asked for, {OTHER.id}"
        ):
            await fetch(some.sharing, wanted(OWN, liar), sizes_of)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"size": OWN.nbytes + 1}, "bytes"), ({"ranks": (3,)}, "ranks"), ({"kind": "prefix"}, "kind")],
)
async def test_a_card_that_lies_about_its_content_is_found_out_before_a_blob_comes(
    autojump_clock: object, changes: dict[str, Any], says: str
):
    async with peers() as some:
        asked = Liar()
        peer = some.add("a", asked)
        one = replace(wanted(OWN, peer), signed=signed(OWN, **changes))
        with pytest.raises(PeerGone, match=says):
            await fetch(some.sharing, one, sizes_of)
        assert not any(isinstance(each, AskBlobs) for each in asked.asked)


async def test_parts_out_of_order_end_it(autojump_clock: object):
    class Jumps(Liar):
        def parts(self, block: int) -> Iterator[BlobPart]:
            return iter([BlobPart(block + 1, 0, self.blobs[block])])

    async with peers() as some:
        liar = some.add("a liar", Jumps())
        with pytest.raises(PeerGone, match="of block 1 came, 0 of block 0 was to come"):
            await fetch(some.sharing, wanted(OWN, liar), sizes_of)


async def test_more_bytes_than_the_model_has_are_refused(autojump_clock: object):
    async with peers() as some:
        liar = some.add("a liar", Liar([blob + b"\0" for blob in OWN.blobs]))
        with pytest.raises(PeerGone, match="bytes of a blob"):
            await fetch(some.sharing, wanted(OWN, liar), sizes_of)


async def test_a_busy_seeder_is_asked_again_and_one_that_has_nothing_is_not(autojump_clock: object):
    class Busy(Liar):
        async def answer(self, stream: FakeStream, question: object) -> None:
            if len(self.asked) == 1:
                await stream.send(encode_failed(Failed.of(TooManyStreams("busy", 2.0))))
            else:
                await super().answer(stream, question)

    class Empty(Liar):
        async def answer(self, stream: FakeStream, question: object) -> None:
            await stream.send(encode_failed(Failed.of(Refused("not here"))))

    async with peers() as some:
        busy, empty = some.add("busy", Busy()), some.add("empty", Empty())
        begin = trio.current_time()
        assert await fetch(some.sharing, wanted(OWN, busy, empty), sizes_of) == OWN
        assert some.opened == [busy, empty, busy]
        assert trio.current_time() - begin == pytest.approx(2.0, abs=0.2)


async def test_without_a_seeder_the_error_says_so(autojump_clock: object):
    async with peers() as some:
        with pytest.raises(PeerGone, match="none is known"):
            await fetch(some.sharing, wanted(OWN), sizes_of)
        gone = PeerId("gone")
        with pytest.raises(PeerGone, match="gone: gone is not there"):
            await fetch(some.sharing, wanted(OWN, gone), sizes_of)


async def test_an_adapter_that_does_not_fit_the_model_is_the_user_s_error(autojump_clock: object):
    def unfit(_: AdapterManifest) -> list[int]:
        raise ConfigError("it does not fit")

    async with peers() as some:
        peer = some.add("a", seeder(OWN).serve)
        with pytest.raises(ConfigError, match="does not fit"):
            await fetch(some.sharing, wanted(OWN, peer), unfit)


def test_an_adapter_without_bytes_is_complete_with_its_manifest():
    one = Fetch(wanted(OWN), LIMITS, sizes_of, sizes=[0, 0])
    assert one.missing == (0, 2)
    one.blobs = {0: b""}
    assert one.missing == (1, 2)
    one.blobs = {0: b"", 1: b""}
    assert one.missing is None


# Cards


def pages_of(some: Peers, name: str, pages: Iterator[CardsPage]) -> PeerId:
    """A peer that gives these pages, whatever it is asked for."""

    async def serve(stream: FakeStream) -> None:
        while (await stream.receive()) is not None:
            await stream.send(encode_page(next(pages)))

    return some.add(name, serve)


async def test_forged_cards_leave_their_seeder_out_and_nobody_else(autojump_clock: object):
    async with peers() as some:
        wire = signed(OWN).wire
        forged = wire[:-1] + bytes([wire[-1] ^ 1])
        pages_of(some, "a liar", itertools.repeat(CardsPage((forged,), False)))
        good = some.add("good", seeder(OWN).serve)
        found = await some.sharing.catalogue("r")
        assert [(each.card.id, each.seeders) for each in found] == [(OWN.id, (good,))]


async def test_pages_without_an_end_are_cut(autojump_clock: object):
    async with peers() as some:
        wire = signed(OWN).wire
        pages_of(some, "same", itertools.repeat(CardsPage((wire,), True)))
        assert len(await some.sharing.catalogue("r")) == 1  # the second page does not go on behind the first

    limits = replace(LIMITS, max_adapter_cards_per_seeder=7)
    cards = sorted(
        (signed(content(seed=n % 11, blocks=2 + n // 11)) for n in range(22)), key=lambda c: c.card.id
    )
    async with peers(limits) as some:
        endless = (CardsPage(tuple(c.wire for c in cards[at : at + 3]), True) for at in itertools.count(0, 3))
        pages_of(some, "endless", endless)
        assert len(await some.sharing.catalogue("r")) == 7


async def test_cards_of_another_revision_do_not_count(autojump_clock: object):
    async with peers() as some:
        pages_of(some, "a", itertools.repeat(CardsPage((signed(content(revision="s")).wire,), False)))
        assert await some.sharing.catalogue("r") == []


async def silent(_: FakeStream) -> None:
    await trio.sleep_forever()


async def test_silent_peers_cost_their_deadline_together(autojump_clock: object):
    async with peers() as some:
        for number in range(20):
            some.add(f"p{number}", silent)
        good = some.add("a good one", seeder(OWN).serve)
        begin = trio.current_time()
        found = await some.sharing.catalogue("r")
        assert [each.seeders for each in found] == [(good,)]
        assert trio.current_time() - begin <= 3 * CARDS_SECONDS


async def test_so_many_seeders_are_asked_and_no_more(autojump_clock: object):
    async with peers(replace(LIMITS, max_adapter_seeders=3)) as some:
        for number in range(9):
            some.add(f"p{number}", seeder(OWN).serve)
        found = await some.sharing.catalogue("r")
        assert len(found[0].seeders) == len(some.opened) == 3
        assert len(await some.sharing.seeders(found[0])) == 3


async def test_an_author_s_name_is_not_the_swarm_s(autojump_clock: object):
    author = identity_of(bytes(31) + b"\7")
    async with peers() as some:
        cards = (signed(OWN, "story"), signed(OTHER, "story", author))
        for number, card in enumerate(cards):
            pages_of(some, f"p{number}", itertools.repeat(CardsPage((card.wire,), False)))
        found = await some.sharing.catalogue("r")
        assert {(each.card.name, each.card.author) for each in found} == {
            ("story", card.card.author) for card in cards
        }
