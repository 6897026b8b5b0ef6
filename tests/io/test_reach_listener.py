"""Peers that ask whether they are reached: dialled back at their own machine alone, and seldom."""

from __future__ import annotations

import pytest
import trio

from node.network.addresses import Address
from node.network.reachability.asking import ask_for_reach
from node.network.reachability.listener import ReachListener
from node.network.reachability.probing import Prober
from node.network.transport.upgrade import Upgrade
from routing.names import PeerId
from tensor_codec.errors import (
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    TooManyStreams,
)
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import (
    Outcome,
    Reached,
    ReachQuestion,
    Seen,
    encode_reach,
    encode_reached,
    encode_seen,
)
from tests.fakes import ALICE, BOB, MemoryLink, memory_framed_pair

LIMITS = Limits()
ME = "203.0.113.7"


class Dials:
    """Dials back that take `seconds`; what was dialled."""

    def __init__(self, outcome: Outcome = "reached", seconds: float = 0.0) -> None:
        self.outcome, self.seconds = outcome, seconds
        self.dialled: list[Address] = []

    async def __call__(self, peer: PeerId, address: Address) -> Outcome:
        assert peer == ALICE.peer_id
        self.dialled.append(address)
        await trio.sleep(self.seconds)
        return self.outcome


async def ask(
    listener: ReachListener, addresses: list[str], remote: tuple[str, int] | None = (ME, 5000)
) -> tuple[str, dict[str, Outcome]]:
    """One question of Alice to the listener.  Raises what either side raises."""
    ours, theirs = memory_framed_pair()
    fault: PeerFault | Refused | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.answer, theirs, remote)
        try:
            told = await ask_for_reach(ours, addresses, LIMITS)
        except (PeerFault, Refused) as error:
            fault = error
    if fault is not None:
        raise fault
    return told.seen, dict(told.outcomes)


async def test_the_asker_learns_its_address_and_what_came_of_each_of_its_own(autojump_clock: object) -> None:
    dials = Dials()
    listener = ReachListener(LIMITS, dials)
    others = ["/ip4/198.51.100.9/tcp/22", "/dns4/victim.example/tcp/80"]
    found = await ask(listener, ["/ip4/0.0.0.0/tcp/31330", *others, f"/ip4/{ME}/tcp/4001"])
    assert found == (ME, {f"/ip4/{ME}/tcp/31330": "reached", f"/ip4/{ME}/tcp/4001": "reached"})
    assert {str(each) for each in dials.dialled} == {f"/ip4/{ME}/tcp/31330", f"/ip4/{ME}/tcp/4001"}


async def test_a_question_without_addresses_is_answered_at_any_time_and_dials_nobody(
    autojump_clock: object,
) -> None:
    dials = Dials()
    listener = ReachListener(LIMITS, dials)
    for _ in range(3):
        assert await ask(listener, []) == (ME, {})
    assert dials.dialled == []


async def test_a_peer_of_this_machine_is_not_dialled(autojump_clock: object) -> None:
    dials = Dials()
    found = await ask(ReachListener(LIMITS, dials), ["/ip4/0.0.0.0/tcp/22"], ("127.0.0.1", 1))
    assert (found, dials.dialled) == (("127.0.0.1", {}), [])


async def test_a_peer_has_three_questions_at_once_and_one_in_twenty_seconds(autojump_clock: object) -> None:
    listener = ReachListener(LIMITS, Dials())
    for _ in range(LIMITS.reach_questions_burst):
        await ask(listener, [f"/ip4/{ME}/tcp/1"])
    await trio.sleep(LIMITS.reach_question_seconds - 1)
    with pytest.raises(TooManyStreams) as refusal:
        await ask(listener, [f"/ip4/{ME}/tcp/1"])
    assert refusal.value.retry_after_seconds == pytest.approx(1.0)
    await trio.sleep(1.0)
    await ask(listener, [f"/ip4/{ME}/tcp/1"])


async def test_four_addresses_of_the_asker_s_own_machine_are_dialled(autojump_clock: object) -> None:
    dials = Dials()
    texts = [f"/ip4/{ME}/tcp/{port}" for port in range(1, 9)]
    _, outcomes = await ask(ReachListener(LIMITS, dials), texts)
    assert sorted(each.port for each in dials.dialled) == [1, 2, 3, 4]
    assert set(outcomes) == set(texts[: LIMITS.max_reach_addresses])


async def test_eight_questions_are_dialled_for_at_once(autojump_clock: object) -> None:
    listener = ReachListener(Limits(reach_questions_burst=100), Dials(seconds=3.0))
    refused: list[Refused] = []

    async def one() -> None:
        try:
            await ask(listener, [f"/ip4/{ME}/tcp/1"])
        except Refused as refusal:
            refused.append(refusal)

    async with trio.open_nursery() as nursery:
        for _ in range(LIMITS.max_reach_questions + 1):
            nursery.start_soon(one)
    assert [each.code for each in refused] == ["too_many"]
    await ask(listener, [f"/ip4/{ME}/tcp/1"])  # the places are free again


async def test_over_a_relay_nobody_s_address_is_seen(autojump_clock: object) -> None:
    dials = Dials()
    with pytest.raises(Refused, match="relay"):
        await ask(ReachListener(LIMITS, dials), [f"/ip4/{ME}/tcp/1"], remote=None)
    assert dials.dialled == []


async def test_bytes_that_are_no_question_are_a_fault_of_the_peer(autojump_clock: object) -> None:
    for frame in (b"", b"\0\0", b"".join(encode_reach(ReachQuestion(("nonsense",), bytes(8))))):
        ours, theirs = memory_framed_pair()
        await ours.send(frame)
        with pytest.raises(MessageError):
            await ReachListener(LIMITS, Dials()).answer(theirs, (ME, 1))
    ours, theirs = memory_framed_pair()
    with pytest.raises(PeerFault, match="within 5 s"):  # silence ends too
        await ReachListener(LIMITS, Dials()).answer(theirs, (ME, 1))


NONCE = b"\1" * 8


@pytest.mark.parametrize(
    ("address", "nonce"),
    [
        ("nonsense", NONCE),
        ("/dns4/x.example/tcp/1", NONCE),
        ("/ip4/0.0.0.0/tcp/1", NONCE),
        (f"/ip4/{ME}/tcp/1", bytes(8)),
    ],
)
async def test_an_answer_that_cannot_be_is_a_fault(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch, address: str, nonce: bytes
) -> None:
    monkeypatch.setattr("node.network.reachability.asking.secrets.token_bytes", lambda size: NONCE)
    ours, theirs = memory_framed_pair()
    await theirs.send(encode_seen(Seen(address, nonce)))
    await theirs.send(encode_reached(Reached({}, nonce)))
    with pytest.raises(RemoteProtocolError):
        await ask_for_reach(ours, [f"/ip4/{ME}/tcp/1"], LIMITS)


# --- the dial itself ---


async def test_a_dial_that_nobody_answers_ends_after_three_seconds(autojump_clock: object) -> None:
    async def vanish(address: Address) -> MemoryLink:
        await trio.sleep_forever()
        raise AssertionError

    prober = Prober(Upgrade(BOB, None, LIMITS), LIMITS, vanish)
    began = trio.current_time()
    assert await prober(ALICE.peer_id, Address("ip4", ME, 1)) == "timed out"
    assert trio.current_time() - began == pytest.approx(LIMITS.reach_dial_seconds)


async def test_a_closed_port_is_refused(autojump_clock: object) -> None:
    async def refuse(address: Address) -> MemoryLink:
        raise PeerGone("Connection refused")

    prober = Prober(Upgrade(BOB, None, LIMITS), LIMITS, refuse)
    assert await prober(ALICE.peer_id, Address("ip4", ME, 1)) == "refused"
