"""A server gives its operator's adapters on the streams on which clients bring their own."""

from __future__ import annotations

from functools import partial

import trio

from node.network.transport.identity import identity_of
from node.runtime.faults import Faults
from node.serving.adapters.desk import OwnAdapter, open_desk
from node.serving.adapters.listener import AdapterListener
from node.serving.adapters.own_cards import sign_own
from node.serving.span_admission import SpanAdmission
from routing.names import PeerId
from routing.sharing.cards import verify_card
from tensor_codec.blocks import Blocks
from tensor_codec.errors import PeerFault
from tensor_codec.frame import Buffer
from tensor_codec.limits import MIB
from tensor_codec.messages.adapter import (
    ADAPTER_PROTOCOL,
    HeldAdapter,
    Need,
    Offer,
    decode_need_or_held,
    encode_offer,
)
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
from tensor_codec.span_spec import SpanSpec
from tests.adapter_fixtures import content, shapes
from tests.fakes_serving import HIDDEN, FakeCompute, FakeStream, stream_pair
from tests.sharing_fixtures import LIMITS, signed

NODE = identity_of(bytes(31) + b"\5")
RUN = Blocks(1, 4)
SPEC = SpanSpec("m", "r", RUN, "float32", hidden=HIDDEN, max_position=512)
OWN, GUEST = content(2), content(1)


def listener(*own: OwnAdapter, gives: bool = True) -> AdapterListener:
    """A server of blocks 1 to 3 that keeps these adapters."""
    sign = partial(sign_own, NODE, "m", LIMITS) if gives else None
    desk = open_desk(LIMITS, 6, "cpu", MIB, MIB, own, sign)
    known = shapes(*RUN)
    admission = SpanAdmission(SPEC, adapters=desk.store)
    return AdapterListener(admission, desk, lambda: known, FakeCompute(), LIMITS, Faults(LIMITS))


def stream_to(nursery: trio.Nursery, one: AdapterListener) -> FakeStream:
    ours, theirs = stream_pair(PeerId("guest"), PeerId("server"), ADAPTER_PROTOCOL, LIMITS)

    async def serve() -> None:
        try:
            await one.serve(theirs)
            await theirs.aclose()
        except PeerFault as fault:
            one.faults.add("guest", fault)
            await theirs.reset()

    nursery.start_soon(serve)
    return ours


async def ask(stream: FakeStream, question: Question) -> Buffer:
    await stream.send(encode_question(question))
    with trio.fail_after(100):
        frame = await stream.receive()
    assert frame is not None
    return frame


async def test_a_node_gives_its_operator_s_adapter_whole_whatever_it_serves(
    autojump_clock: object, nursery: trio.Nursery
):
    stream = stream_to(nursery, listener(OwnAdapter("_story", OWN.id, OWN.manifest, OWN.blobs)))
    page = decode_page(await ask(stream, AskCards("r")), LIMITS)
    assert isinstance(page, CardsPage)
    (card,) = (verify_card(wire, LIMITS) for wire in page.cards)
    assert (card.id, card.name, card.author, card.licence) == (OWN.id, "story", NODE.peer_id, "NOASSERTION")
    assert card.size == OWN.nbytes
    found = decode_content(await ask(stream, AskManifest(OWN.id)), OWN.id, LIMITS)
    assert isinstance(found, SharedManifest)
    card.check(found.manifest)
    part = decode_shared_part(await ask(stream, AskBlobs(OWN.id, Blocks(5, 6))), len(OWN.blobs[5]))
    assert bytes(part.data) == OWN.blobs[5]


async def test_an_author_s_card_is_given_on(autojump_clock: object, nursery: trio.Nursery):
    card = signed(OWN, "theirs")
    own = OwnAdapter("ours", OWN.id, OWN.manifest, OWN.blobs, card.wire)
    page = decode_page(await ask(stream_to(nursery, listener(own)), AskCards("r")), LIMITS)
    assert isinstance(page, CardsPage)
    assert page.cards == (card.wire,)


async def test_what_a_guest_has_brought_is_given_to_nobody(autojump_clock: object, nursery: trio.Nursery):
    one = listener()
    guest = stream_to(nursery, one)
    one.desk.store.reserve("guest", "", GUEST.id, GUEST.manifest, 0, 0.0)
    page = decode_page(await ask(guest, AskCards("r")), LIMITS)
    assert page == CardsPage((), False)
    refused = decode_shared_part(await ask(guest, AskManifest(GUEST.id)), 1)
    assert refused.code == "refused"


async def test_offers_and_questions_go_over_one_stream(autojump_clock: object, nursery: trio.Nursery):
    one = listener(OwnAdapter("story", OWN.id, OWN.manifest, OWN.blobs))
    stream = stream_to(nursery, one)
    await ask(stream, AskCards("r"))
    empty = content(empty=range(6))
    spec = SpanSpec("m", "r", RUN, "float32", empty.id)
    await stream.send(encode_offer(Offer(spec, empty.manifest, empty.digests)))
    for expected in (Need, HeldAdapter):  # of no bytes
        frame = await stream.receive()
        assert frame is not None
        assert isinstance(decode_need_or_held(frame, RUN), expected)
    await ask(stream, AskManifest(OWN.id))
    assert one.faults.counts() == {}


async def test_a_node_that_shares_nothing_says_so(autojump_clock: object, nursery: trio.Nursery):
    one = listener(OwnAdapter("story", OWN.id, OWN.manifest, OWN.blobs), gives=False)
    assert decode_page(await ask(stream_to(nursery, one), AskCards("r")), LIMITS) == CardsPage((), False)
