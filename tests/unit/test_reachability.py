"""A node's own reach: rounds of questions, verdicts, the words of its record and of its log."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.addresses import Address, parse_address
from node.network.own_addresses import OwnAddresses
from node.network.reachability.candidates import (
    FAMILIES,
    of_family,
    seen_as,
    to_ask_about,
    to_dial_back,
    whom_to_ask,
)
from node.network.reachability.own_reach import own_reach, report
from node.network.reachability.state import (
    ALONE_SECONDS,
    ASKED,
    CHECK_SECONDS,
    FIRST_PAUSE_SECONDS,
    MAX_TRIED,
    NEAR_SECONDS,
    Reachability,
    Told,
    Verdict,
    together,
)
from routing.names import PeerId
from routing.view.records import Record

OUTSIDE, PORT = "203.0.113.7", 31330
DIRECT = f"/ip4/{OUTSIDE}/tcp/{PORT}"
PRIVATE = f"/ip4/192.168.1.11/tcp/{PORT}"
ANY = f"/ip4/0.0.0.0/tcp/{PORT}"
SIX = f"/ip6/2606:4700::7/tcp/{PORT}"
PEERS = [PeerId(name) for name in "abcdefghijkl"]
A, B, C = PEERS[:3]


def told(outcome: str | None, seen: str = OUTSIDE, address: str = DIRECT) -> Told:
    return Told(seen, {} if outcome is None else {address: outcome})  # type: ignore[dict-item]


def round_of(state: Reachability, answers: list[Told | None], now: float = 0.0) -> None:
    """Ask as many peers as there are answers, and end the round."""
    peers = PEERS[: len(answers)]
    left = dict(zip(peers, answers, strict=True))
    while asked := state.to_ask(peers, now):
        for peer in asked:
            state.answered(peer, left[peer], now)


def fresh(*addresses: str) -> Reachability:
    state = Reachability()
    assert state.set_addresses(addresses or (ANY, PRIVATE), 0.0)
    return state


# --- the rounds ---


def test_three_peers_are_asked_and_another_for_each_without_an_answer() -> None:
    state = fresh()
    assert state.to_ask(PEERS, 0.0) == PEERS[:3]
    assert state.to_ask(PEERS, 0.0) == []
    state.answered(A, None, 1.0)
    assert state.to_ask(PEERS, 1.0) == [PEERS[3]]


def test_two_peers_that_reach_the_node_are_enough_before_the_third_has_spoken() -> None:
    state = fresh()
    state.to_ask(PEERS, 0.0)
    state.answered(A, told("reached"), 0.1)
    assert state.verdict.reach == "unknown"
    state.answered(B, told("reached"), 0.2)
    assert (state.verdict.reach, state.verdict.verified) == ("public", (DIRECT,))


def test_two_that_fail_outvote_one_that_says_it_reached() -> None:
    state = fresh()
    round_of(state, [told("reached"), told("timed out"), told("refused")])
    assert state.verdict.reach == "none"
    state = fresh()
    round_of(state, [told("timed out"), told("timed out"), told("refused")])
    assert (state.verdict.reach, state.verdict.failures) == ("none", {DIRECT: "timed out"})


def test_one_peer_decides_only_in_a_swarm_of_two() -> None:
    for outcome, reach in (("reached", "public"), ("timed out", "none")):
        state = fresh()
        round_of(state, [told(outcome)])
        assert state.verdict.reach == reach
    state = fresh()
    round_of(state, [told("timed out"), None, None])  # older versions: the one that speaks may lie
    assert state.verdict.reach == "unknown"


def test_a_round_without_answers_is_repeated_ever_more_rarely_and_a_verdict_stands_for_15_minutes() -> None:
    state, now, pauses = fresh(), 0.0, []
    for _ in range(4):
        round_of(state, [None, None], now)
        pauses.append(state.seconds_left(now))
        now += pauses[-1]
    assert pauses == [FIRST_PAUSE_SECONDS * 2**n for n in range(4)]
    round_of(state, [told("reached"), told("reached"), told("reached")], now)
    assert state.seconds_left(now) == CHECK_SECONDS
    assert state.to_ask(PEERS, now + CHECK_SECONDS - 1) == []
    assert state.to_ask(PEERS, now + CHECK_SECONDS) == PEERS[:3]


def test_homes_that_nobody_can_ask_keep_no_home_from_learning_its_reach() -> None:
    """A swarm of one public node and several homes, and another one with a second public node."""
    for other, reach in ((None, "none"), (told("reached"), "unknown")):
        state = fresh()
        asked = state.to_ask(PEERS[:3], 0.0)
        state.answered(A, told("timed out"), 0.1)
        state.unreached(B, 0.1)
        if other is None:
            state.unreached(C, 0.1)
        else:
            state.answered(C, other, 0.1)
        assert asked == PEERS[:3]
        assert state.to_ask(PEERS[:3], 0.1) == []
        assert state.verdict.reach == reach


def test_who_finds_nobody_to_ask_looks_again_soon_however_long_it_has_been_alone() -> None:
    state, now = fresh(), 0.0
    for _ in range(10):
        assert state.to_ask([], now) == []
        assert state.seconds_left(now) == ALONE_SECONDS
        now += ALONE_SECONDS


def test_other_addresses_end_the_round_and_its_answers_count_no_more() -> None:
    state = fresh()
    round_of(state, [told("reached"), told("reached")])
    state.check_again(1.0)
    state.to_ask(PEERS, 1.0)
    assert state.set_addresses((ANY, f"/ip4/192.168.1.12/tcp/{PORT}"), 1.0)
    assert state.verdict == Verdict()
    state.answered(A, told("reached"), 1.1)
    state.answered(B, told("reached"), 1.1)
    assert state.verdict == Verdict()
    assert state.to_ask(PEERS, 1.1) == PEERS[:3]
    assert not state.set_addresses((ANY, f"/ip4/192.168.1.12/tcp/{PORT}"), 1.2)


def test_neighbours_in_one_house_count_where_nobody_outside_says_anything() -> None:
    state = fresh()
    near = told("reached", "192.168.1.11", PRIVATE)
    round_of(state, [near, near])
    assert (state.verdict.reach, state.verdict.verified, state.verdict.seen) == ("public", (PRIVATE,), ())
    assert state.seconds_left(0.0) == NEAR_SECONDS, "a friend outside may join, who dials no private address"
    state = fresh()
    round_of(state, [near, told("timed out"), told("timed out")])
    assert (state.verdict.reach, state.verdict.seen) == ("none", (OUTSIDE,))


def test_neighbours_that_are_known_outside_make_a_node_no_public_one() -> None:
    near = told("reached", "192.168.1.11", PRIVATE)
    state = fresh()
    round_of(state, [near, near])
    assert (state.verdict.reach, state.seconds_left(0.0)) == ("public", NEAR_SECONDS)
    round_of(state, [replace(near, house=OUTSIDE), near], NEAR_SECONDS)
    assert (state.verdict.reach, state.verdict.seen, state.verdict.verified) == ("none", (OUTSIDE,), ())
    assert state.seconds_left(NEAR_SECONDS) == NEAR_SECONDS
    alone = fresh()
    round_of(alone, [near])
    round_of(alone, [Told("192.168.1.11", {}, OUTSIDE)], NEAR_SECONDS)  # its relay: its dials prove nothing
    assert (alone.verdict.reach, alone.verdict.seen) == ("none", (OUTSIDE,))
    found = own_reach(state.verdict, OWN, [A])
    assert (found.reach, found.lan, found.seen) == ("relayed", (PRIVATE,), OUTSIDE)
    assert "2 peers of this network answered" in report(state.verdict, found, OWN)
    round_of(state, [replace(near, house=OUTSIDE), told("reached")], 2 * NEAR_SECONDS)
    assert (state.verdict.reach, state.verdict.verified) == (
        "public",
        (DIRECT,),
    )  # somebody outside has tried


def test_peers_of_the_same_machine_say_nothing() -> None:
    state = fresh()
    round_of(state, [told(None, "127.0.0.1"), told(None, "127.0.0.1")])
    assert (state.verdict.reach, state.verdict.answers) == ("unknown", 0)


def test_each_family_has_its_own_verdict_and_one_that_is_public_is_enough() -> None:
    four, six = fresh(ANY), fresh("/ip6/::/tcp/31330", SIX)
    assert together([four, six]).reach == "unknown"
    round_of(four, [told("timed out"), told("timed out")])
    assert (four.verdict.reach, together([four, six]).reach) == ("none", "unknown")  # IPv6 may yet work
    reached = told("reached", "2606:4700::7", SIX)
    round_of(six, [reached, reached, reached])
    both = together([four, six])
    assert (both.reach, both.verified, both.answers) == ("public", (SIX,), 3)
    assert both.seen == (OUTSIDE, "2606:4700::7")
    assert both.failures == {DIRECT: "timed out"}


def test_a_family_over_which_nobody_can_be_asked_decides_nothing() -> None:
    four, six = fresh(ANY), fresh("/ip6/::/tcp/31330", SIX)
    round_of(four, [told("timed out"), told("timed out")])
    assert six.to_ask([], 0.0) == []  # its round is over
    assert together([four, six]).reach == "none"
    nothing = Reachability()
    assert together([four, nothing]).reach == "none"  # it does not listen on IPv6
    assert together([nothing, nothing]).reach == "unknown"


def test_a_second_address_of_the_same_ipv6_network_is_as_good_as_tried() -> None:
    for other, reach in (("2606:4700::99", "none"), ("2606:4700:1::99", "unknown")):
        state = fresh("/ip6/::/tcp/31330", SIX, f"/ip6/{other}/tcp/31330")
        failed = told("timed out", "2606:4700::7", SIX)
        round_of(state, [failed, failed, failed])
        assert state.verdict.reach == reach


def test_a_round_in_which_nobody_could_try_anything_changes_nothing() -> None:
    state = fresh()
    round_of(state, [told("timed out"), told("timed out")])
    round_of(state, [told(None), told(None)], CHECK_SECONDS)
    assert state.verdict.reach == "none"


ANSWERS = st.one_of(
    st.none(), st.builds(told, st.sampled_from(("reached", "timed out", "refused", "another peer")))
)


@given(st.lists(ANSWERS, max_size=12), st.randoms(use_true_random=False))
def test_no_peer_alone_decides_and_few_are_asked(answers: list[Told | None], rng: random.Random) -> None:
    state, peers = fresh(), PEERS[: len(answers)]
    of = dict(zip(peers, answers, strict=True))
    under_way: list[PeerId] = []
    asked: list[PeerId] = []
    while True:
        new = state.to_ask(peers, 0.0)
        under_way += new
        asked += new
        assert len(under_way) <= ASKED
        if not under_way:
            break
        peer = under_way.pop(rng.randrange(len(under_way)))
        state.answered(peer, of[peer], 0.0)
    assert len(asked) == len(set(asked)) <= MAX_TRIED
    said = [found for peer in asked if (found := of[peer]) is not None]
    assert len(said) <= ASKED
    good = sum(each.outcomes[DIRECT] == "reached" for each in said)
    if state.verdict.reach == "public":
        assert good >= min(2, len(said))
    elif state.verdict.reach == "none":
        assert len(said) - good >= 2 or len(asked) == 1
    assert state.seconds_left(0.0) > 0


# --- addresses and peers ---


def test_a_question_has_the_ports_at_the_address_that_others_see_and_no_name_and_no_loopback() -> None:
    listening = [Address("ip4", "0.0.0.0", PORT), Address("ip4", "127.0.0.1", 5)]
    texts = [PRIVATE, "/dns4/home.example/tcp/1", "/ip4/127.0.0.1/tcp/5"]
    assert to_ask_about(texts, listening, [DIRECT]) == (ANY, DIRECT, PRIVATE)
    assert to_ask_about(texts, [Address("ip4", "127.0.0.1", 5)]) == ()
    many = [f"/ip4/198.51.100.{number}/tcp/1" for number in range(20)]
    assert len(to_ask_about(many, listening)) == 8
    both = [*many, SIX]
    assert [of_family(to_ask_about(both, listening), kind)[-1] for kind in FAMILIES] == [many[6], SIX]


def test_nobody_is_dialled_but_the_machine_that_asks() -> None:
    texts = [ANY, DIRECT, "/ip4/198.51.100.1/tcp/22", "/dns4/victim.example/tcp/80", PRIVATE]
    found = to_dial_back(texts, OUTSIDE, 4)
    assert found == {0: parse_address(DIRECT)}  # the second is the same address
    ports = [f"/ip4/{OUTSIDE}/tcp/{port}" for port in range(8)]
    assert [each.port for each in to_dial_back(ports, OUTSIDE, 4).values()] == [1, 2, 3, 4]
    assert to_dial_back([ANY], f"::ffff:{OUTSIDE}", 4) == {0: parse_address(DIRECT)}
    assert to_dial_back([ANY], "2606:4700::7", 4) == {}
    with pytest.raises(ValueError, match="multiaddr"):
        to_dial_back(["nonsense"], OUTSIDE, 4)


@given(st.lists(st.sampled_from([ANY, DIRECT, SIX, PRIVATE, "/ip4/198.51.100.1/tcp/1"]), max_size=8))
def test_every_address_that_is_dialled_is_the_one_that_was_seen(texts: list[str]) -> None:
    for seen in (OUTSIDE, "2606:4700::7", "192.168.1.11"):
        for index, address in to_dial_back(texts, seen, 4).items():
            assert address.host == seen
            assert parse_address(seen_as(texts[index], seen)) == address


def test_peers_on_the_internet_are_asked_first_each_of_another_network() -> None:
    def record(name: str, address: str | None) -> Record:
        return Record(peer=PeerId(name), role="serve", addresses=(address,) if address else ())

    records = [
        record("near", "/ip4/192.168.1.12/tcp/1"),
        *(record(f"crowd{n}", f"/ip4/1.1.1.{n}/tcp/1") for n in range(9)),
        record("alone", "/ip4/8.8.8.8/tcp/1"),
        record("linked", None),
        record("gone", None),
        Record(peer=PeerId("client"), role="client", addresses=("/ip4/9.9.9.9/tcp/1",)),
    ]
    for seed in range(5):
        found = whom_to_ask(records, {PeerId("me")}, {PeerId("linked")}, random.Random(seed))
        assert len(found) == 12
        assert "alone" in found[:2]
        assert set(found[-2:]) == {"near", "linked"}
        assert whom_to_ask(records, (), {PeerId("linked")}, random.Random(seed), "ip6") == ["linked"]
        new = whom_to_ask(
            records, (), {PeerId("new")}, random.Random(seed), askers=[PeerId("new"), PeerId("far")]
        )
        assert (new[-1], len(new)) == ("new", 12)


# --- the record and the log ---

OWN = OwnAddresses((PRIVATE,), ("192.168.1.11",), True, False, (PRIVATE,), (Address("ip4", "0.0.0.0", PORT),))
CHOSEN = OWN._replace(announced=(DIRECT,), chosen=True)
PUBLIC = Verdict("public", (DIRECT,), {DIRECT: 3}, {}, 3, (OUTSIDE,))
NONE = Verdict("none", (), {}, {DIRECT: "timed out"}, 3, (OUTSIDE,))


def test_only_verified_addresses_are_announced_and_private_ones_for_the_house() -> None:
    found = own_reach(PUBLIC, OWN)
    assert (found.reach, found.addresses, found.lan, found.seen) == ("public", (DIRECT,), (PRIVATE,), OUTSIDE)
    found = own_reach(NONE, OWN)
    assert (found.reach, found.addresses, found.lan) == ("none", (), (PRIVATE,))
    assert (found.unreached, own_reach(PUBLIC, OWN).unreached) == ("timed out", "")
    found = own_reach(NONE, OWN, PEERS)
    assert (found.reach, found.addresses, found.relays) == ("relayed", (), tuple(PEERS[:3]))
    through = [f"/ip4/198.18.{n}.1/tcp/4001/p2p/12D3KooWabc12{n}" for n in range(3)]
    found = own_reach(NONE, OWN, (), through)
    assert (found.reach, found.through) == ("relayed", tuple(through[:2]))
    assert "relayed by …abc120, …abc121" in report(NONE, found, OWN)
    found = own_reach(Verdict(), OWN)
    assert (found.reach, found.addresses, found.lan) == ("unknown", (PRIVATE,), ())


def test_chosen_addresses_are_announced_whatever_others_say() -> None:
    for verdict, reach in ((PUBLIC, "public"), (NONE, "unknown"), (Verdict(), "unknown")):
        found = own_reach(verdict, CHOSEN)
        assert (found.reach, found.addresses[0]) == (reach, DIRECT)


def test_a_node_helps_others_only_where_it_is_public() -> None:
    assert own_reach(PUBLIC, OWN, relay_mbit=50).relay_mbit == 50
    assert not own_reach(NONE, OWN, relay_mbit=50).helps


@pytest.mark.parametrize(
    ("verdict", "own", "relays", "says"),
    [
        (PUBLIC, OWN, (), ["reachable at /ip4/203.0.113.7/tcp/31330 (3 of 3 peers)"]),
        (
            NONE,
            OWN,
            (),
            [
                "not reachable at 203.0.113.7:31330 (3 peers: timed out)",
                "forward TCP 31330 to 192.168.1.11 on the router",
            ],
        ),
        (NONE, OWN, (PeerId("12D3KooWabc123"),), ["relayed by …abc123. To be faster: forward"]),
        (NONE, CHOSEN, (), ["check --announce"]),
        (
            NONE,
            OWN._replace(announced=(DIRECT,), found=(DIRECT,)),
            (),
            ["let TCP 31330 in through this machine's firewall"],
        ),
        (Verdict(), OWN, (), ["not known"]),
    ],
)
def test_the_log_says_what_came_of_it_and_what_would_help(
    verdict: Verdict, own: OwnAddresses, relays: tuple[PeerId, ...], says: list[str]
) -> None:
    line = report(verdict, own_reach(verdict, own, relays), own)
    assert all(each in line for each in says), line
    assert "\n" not in line
