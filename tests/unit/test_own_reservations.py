"""The relays of a node behind NAT: which ones, when again, and which after a loss."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.network.addresses import parse_address
from node.network.relaying.own_reservations import (
    BOOTSTRAP_RELAYS,
    LONGEST_PAUSE_SECONDS,
    RELAYS,
    Candidate,
    ReservationPlan,
)
from routing.names import PeerId

TTL = 1800.0


def candidate(
    name: str,
    rtt: float | None = 0.01,
    host: str | None = None,
    *,
    bootstrap: bool = False,
    chosen: bool = False,
) -> Candidate:
    host = host or f"198.18.{ord(name[-1])}.1"
    return Candidate(PeerId(name), (f"/ip4/{host}/tcp/4001",), rtt, bootstrap, chosen)


A, B, C, D = (candidate(name, rtt) for name, rtt in zip("abcd", (0.01, 0.02, 0.03, 0.04), strict=True))
BOOT = candidate("boot", 0.5, bootstrap=True)


def asked(plan: ReservationPlan, candidates: list[Candidate], now: float = 0.0) -> list[str]:
    return [each.peer for each in plan.due(candidates, now)]


def holding(*candidates: Candidate) -> ReservationPlan:
    plan = ReservationPlan()
    for each in candidates:
        plan.granted(each, TTL, 0.0, None)
    return plan


def test_the_two_nearest_and_a_bootstrap_node_are_asked():
    assert asked(ReservationPlan(), [D, BOOT, B, A, C]) == ["a", "b", "boot"]
    assert asked(ReservationPlan(), [BOOT]) == ["boot"]
    far = candidate("far", None)
    assert asked(ReservationPlan(), [far, D]) == ["d", "far"], "an unknown distance comes last"


def test_two_bootstrap_nodes_are_asked_where_no_other_relay_is():
    other = candidate("other", 0.6, bootstrap=True)
    assert asked(ReservationPlan(), [BOOT, other]) == ["boot", "other"]
    assert asked(ReservationPlan(), [BOOT, other, A]) == ["a", "boot"]
    plan = holding(BOOT, other)
    assert asked(plan, [BOOT, other, A, B]) == ["a"], "three in all"
    plan.lost(BOOT.peer)
    assert asked(plan, [BOOT, other, A, B]) == ["a", "b"]


def test_relays_at_different_addresses_come_first():
    near = candidate("n", 0.011, "198.18.97.1")  # where A is
    assert asked(ReservationPlan(), [A, near, D]) == ["a", "d"]
    assert asked(ReservationPlan(), [A, near]) == ["a", "n"]
    assert asked(holding(A), [A, near, D]) == ["d"]


def test_a_reservation_is_asked_for_again_when_half_of_its_time_is_over():
    plan = holding(A, B)
    assert asked(plan, [A, B, C], 899.0) == []
    assert asked(plan, [A, B, C], 900.0) == ["a", "b"]
    plan.granted(A, TTL, 900.0, None)
    assert asked(plan, [A, B, C], 901.0) == ["b"]


def test_a_lost_relay_is_replaced_at_the_next_look_by_another_one():
    plan = holding(A, B)
    plan.lost(A.peer)
    plan.refused(A.peer, 10.0)
    assert asked(plan, [A, B, C], 10.0) == ["c"]
    assert plan.relays == ("b",)


def test_a_relay_that_refuses_is_left_alone_for_a_pause_that_doubles():
    plan, now, pauses = ReservationPlan(), 0.0, []
    for _ in range(10):
        assert asked(plan, [A], now) == ["a"]
        plan.refused(A.peer, now)
        began = now
        while not asked(plan, [A], now):
            now += 1.0
        pauses.append(now - began)
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    plan.granted(A, TTL, now, None)
    plan.lost(A.peer)
    assert asked(plan, [A], now) == ["a"], "it relays again"


def test_a_refused_refresh_leaves_the_reservation_until_its_end():
    plan = holding(A)
    plan.refused(A.peer, 900.0)
    assert plan.relays == ("a",)
    assert asked(plan, [A], 901.0) == []
    assert asked(plan, [A], 902.0) == ["a"]
    assert asked(plan, [], 1800.0) == []
    assert plan.relays == ()


def test_the_operator_s_relays_are_asked_next_to_the_others():
    chosen = candidate("x", None, chosen=True)
    assert asked(ReservationPlan(), [A, B, C, chosen]) == ["x", "a", "b"]


def test_a_node_that_relays_see_at_different_ports_knows_its_nat_by_that():
    plan = ReservationPlan()
    plan.granted(A, TTL, 0.0, parse_address("/ip4/198.18.100.11/tcp/4001"))
    plan.granted(B, TTL, 0.0, parse_address("/ip4/198.18.100.11/tcp/4001"))
    assert not plan.is_symmetric
    assert list(map(str, plan.seen_at)) == ["/ip4/198.18.100.11/tcp/4001"]
    plan.granted(C, TTL, 0.0, parse_address("/ip6/2001:db8::1/tcp/4001"))
    assert not plan.is_symmetric, "two families are two mappings"
    plan.granted(D, TTL, 0.0, parse_address("/ip4/198.18.100.11/tcp/50001"))
    assert plan.is_symmetric


@given(st.lists(st.tuples(st.sampled_from("glrt"), st.integers(0, 9)), max_size=80))
def test_there_are_never_more_reservations_than_places(happenings: list[tuple[str, int]]):
    candidates = [candidate(str(number), number / 100, bootstrap=number > 6) for number in range(10)]
    plan, now = ReservationPlan(), 0.0
    for what, number in happenings:
        if what == "g":
            for each in plan.due(candidates, now):
                plan.granted(each, TTL, now, None)
        elif what == "l":
            plan.lost(candidates[number].peer)
        elif what == "r":
            plan.refused(candidates[number].peer, now)
        else:
            now += number * 100.0
        assert len(plan.relays) <= RELAYS + BOOTSTRAP_RELAYS
        assert all(held.ends_at >= held.refresh_at for held in plan.held.values())
