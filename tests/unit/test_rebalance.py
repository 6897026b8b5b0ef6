"""A joining server takes the window of blocks that the swarm needs most; one that moves opens no gap."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from routing.blocks import Blocks, coverage
from routing.names import PeerId, peer_id_of
from routing.placement.cover_gaps import opens_gap
from routing.placement.goals import MIN_REPLICAS, QUALITY
from routing.placement.rebalance import (
    GOOD,
    RANK_CHANCE,
    REPLICA_WORTH,
    Move,
    _shortfalls,
    _single,
    better_window,
    choose_blocks,
    holders,
    in_turn,
    moves,
    plausible,
    replicas,
)
from routing.placement.throughput import Holder, bound, capacity, ends, reach
from routing.view.records import Record
from routing.view.view import RELAYED_BYTES_PER_SECOND


def span(number, start, stop, seconds=0.01, blocks=12):
    return Record(
        peer=peer_id_of(number.to_bytes(32, "big")),
        role="serve",
        blocks=blocks,
        start=start,
        stop=stop,
        seconds_per_block=seconds,
    )


parts = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12), st.sampled_from([0.0, 0.005, 0.01, 0.02])).filter(
        lambda part: part[0] < part[1]
    ),
    max_size=6,
)


@given(parts, st.integers(1, 12))
def test_no_other_window_covers_more_that_nobody_holds(found, count):
    spans = [span(number, *part) for number, part in enumerate(found)]
    alone = [number == 0 for number in coverage(spans, 12)]
    start, stop = choose_blocks(spans, 12, count)
    assert stop - start == count
    assert sum(alone[start:stop]) == max(sum(alone[s : s + count]) for s in range(12 - count + 1))


@given(parts, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_records(found, count, rng):
    spans = [span(number, *part) for number, part in enumerate(found)]
    assert choose_blocks(rng.sample(spans, len(spans)), 12, count) == choose_blocks(spans, 12, count)


@given(parts, st.integers(1, 12), st.integers(0, 2**32))
def test_the_same_chance_gives_the_same_window(found, count, seed):
    spans = [span(number, *part) for number, part in enumerate(found)]
    chosen = choose_blocks(spans, 12, count, random.Random(seed))
    assert chosen == choose_blocks(spans, 12, count, random.Random(seed))


@given(st.integers(1, 40), st.integers(1, 40))
@example(40, 33)
def test_nodes_that_join_one_after_the_other_cover_the_model_with_as_few_as_can(blocks, count):
    spans = []
    for number in range(math.ceil(blocks / count)):
        spans.append(span(number, *choose_blocks(spans, blocks, count), blocks=blocks))
    assert min(coverage(spans, blocks)) >= 1


@given(st.lists(st.integers(1, 12), min_size=12, max_size=20), st.integers(0, 2**32))
def test_nodes_of_any_size_cover_the_model_before_they_double_it(counts, seed):
    """With chance among ties too, each node that joins takes at least one block that nobody holds."""
    spans, rng = [], random.Random(seed)
    for number, count in enumerate(counts):
        before = coverage(spans, 12)
        spans.append(span(number, *choose_blocks(spans, 12, count, rng)))
        after = coverage(spans, 12)
        assert min(after) >= 1 or sum(c > 0 for c in after) > sum(c > 0 for c in before)
    assert min(coverage(spans, 12)) >= 1


def test_a_hole_is_filled_before_a_slow_block_is_helped():
    spans = [span(0, 0, 4), span(1, 4, 8, 10.0), span(2, 9, 12)]
    start, stop = choose_blocks(spans, 12, 2)
    assert start <= 8 < stop


def test_among_covered_blocks_the_slowest_are_helped():
    spans = [span(0, 0, 4, 0.01), span(1, 4, 8, 0.04), span(2, 8, 12, 0.01)]
    start, _ = choose_blocks(spans, 12, 4)
    assert 3 <= start <= 5


def test_a_boast_does_not_keep_others_away_for_long():
    honest = [span(n, 0, 12, 0.01) for n in range(3)]
    boast = span(9, 0, 6, 1e-7)
    assert holders([*honest, boast])[-1].rate == pytest.approx(100)


def test_fast_servers_count_in_full_and_exaggeration_does_not_pay():
    slow, fast = {PeerId(f"s{n}"): 100.0 for n in range(6)}, {PeerId(f"f{n}"): 300.0 for n in range(3)}
    others, me = slow | fast, PeerId("me")
    assert plausible({**others, me: 700.0}) == {**others, me: 700.0}
    worth = [plausible({**others, me: claim})[me] for claim in (900.0, 1000.0, 2000.0, 1e9)]
    assert worth == [900.0, pytest.approx(810.0), pytest.approx(405.0), 100.0]
    assert plausible({}) == {}


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=12))
def test_no_claim_counts_for_more_than_it_says_or_for_less_than_the_median(claims):
    found = plausible({PeerId(str(n)): claim for n, claim in enumerate(claims)})
    median = sorted(claims)[(len(claims) - 1) // 2]
    assert all(
        min(claim, median) <= rate <= claim for claim, rate in zip(claims, found.values(), strict=True)
    )


def test_a_peer_that_has_not_measured_counts_as_the_median():
    assert [h.rate for h in holders([span(0, 0, 6, 0.01), span(1, 6, 12, 0.0)])] == pytest.approx([100, 100])
    assert [h.rate for h in holders([span(0, 0, 6, 0.0)])] == [1.0]


def test_a_node_with_room_for_more_than_the_model_takes_it_all():
    assert choose_blocks([], 12, 99) == (0, 12)


def test_a_node_with_room_for_nothing_is_told_so():
    with pytest.raises(ValueError, match="at least 1"):
        choose_blocks([], 12, 0)


def swarm_of(seed, servers=14, blocks=20):
    """Servers of mixed sizes where chance put them, on covered blocks."""
    rng, held = random.Random(seed), []
    for number in range(servers):
        count = rng.choice([2, 3, 5, 9])
        start = rng.randrange(blocks - count + 1)
        peer = PeerId(f"{number:03}")
        held.append(Holder(peer, start, start + count, rng.uniform(50, 300), rng.random() < 0.9))
    return held


def moved(held, move, online=True):
    return [
        h._replace(start=move.start, stop=move.stop, online=online) if h.peer == move.peer else h
        for h in held
    ]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_no_block_loses_its_last_online_holder_in_whatever_order_the_moves_are_made(seed, rng):
    held = swarm_of(seed)
    found = moves(held, 20)
    for move in found:
        own = next(h.blocks for h in held if h.peer == move.peer)
        assert not opens_gap(held, move.peer, own, move.blocks)
    at_once = [move for move in found if move.rank == 0]
    assert len({move.peer for move in at_once}) == len(at_once)
    now = held
    for move in rng.sample(at_once, len(at_once)):
        own = next(h.blocks for h in now if h.peer == move.peer)
        assert not opens_gap(now, move.peer, own, move.blocks)
        kept = max(own[0], move.start), min(own[1], move.stop)  # is served on while the rest is loaded
        now = [h._replace(start=kept[0], stop=max(kept)) if h.peer == move.peer else h for h in now]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_everyone_ranks_the_moves_alike_and_the_first_are_made(seed, rng):
    held = swarm_of(seed)
    ranked = moves(held, 20)
    assert ranked == moves(rng.sample(held, len(held)), 20)
    assert not ranked or ranked[0].rank == 0
    for move in ranked:
        if move.rank == 0:
            window = better_window(held, 20, move.peer, move.stop - move.start, rng=rng)
            assert window == (move.start, move.stop)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_moves_end_and_never_lower_the_number_of_covered_blocks(seed, min_replicas):
    held = swarm_of(seed)
    for _ in range(200):
        ranked = moves(held, 20, min_replicas=min_replicas)
        if not ranked:
            break
        after = moved(held, ranked[0])
        assert sum(c > 0 for c in covered(after)) >= sum(c > 0 for c in covered(held))
        held = after
    assert moves(held, 20, min_replicas=min_replicas) == []


def test_where_the_capacity_is_good_blocks_with_one_holder_get_another():
    names = [PeerId(name) for name in "abcdef"]
    held = [Holder(names[0], 0, 4, 40.0), Holder(names[1], 4, 12, 80.0)]
    held += [Holder(names[2], 0, 8, 80.0), Holder(names[3], 0, 4, 1.0), Holder(names[4], 8, 12, 40.0)]
    held += [Holder(names[5], 8, 12, 1.0)]
    assert moves(held, 12, min_replicas=2, quality=0.5) == []
    once = [*held[:3], held[3], held[4]._replace(start=0, stop=4), held[5]._replace(start=0, stop=4)]
    assert covered_of(once, 12)[8:] == [1] * 4
    [first, *_] = moves(once, 12, min_replicas=2, quality=0.5)
    assert (first.start, first.stop) == (8, 12)
    assert moves(once, 12, min_replicas=1, quality=0.5) == []
    after = moved(once, first)
    assert min(covered_of(after, 12)) >= 2
    assert capacity(after, 12) >= 0.5 * bound(after, 12)


def test_what_little_two_blocks_lack_is_brought_by_the_one_slow_server_that_can_be_spared():
    """Less than MIN_GAIN of the swarm's work, and 5 % of its capacity; the others are all needed."""
    held = [Holder(PeerId(f"{n:02}"), n // 2 * 2, n // 2 * 2 + 2, 10.0) for n in range(48)]
    held[0] = held[0]._replace(rate=9.0)
    held.append(Holder(PeerId("spare"), 20, 22, 1.0))
    assert capacity(held, 48) == pytest.approx(0.95 * bound(held, 48))
    [move] = moves(held, 48)
    assert move.peer == "spare"
    after = moved(held, move)
    assert capacity(after, 48) == pytest.approx(bound(after, 48))
    assert moves(after, 48) == []


def missing(held, blocks):
    """What is lacking for nearly the bound, as a share of the swarm's work; and replicas at their worth."""
    most = bound(held, blocks)
    lack = -ends(reach(held, blocks), (1 + QUALITY) / 2 * most)[0].min() / (most * blocks)
    return lack + REPLICA_WORTH * sum(max(0, MIN_REPLICAS - count) for count in covered_of(held, blocks))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_once_the_capacity_is_good_it_stays_so_and_less_is_missing_after_every_move(seed):
    held = swarm_of(seed, servers=50, blocks=20)
    for _ in range(100):
        ranked = moves(held, 20)
        if not ranked:
            break
        after = moved(held, ranked[0])
        if capacity(held, 20) >= GOOD * bound(held, 20):
            assert capacity(after, 20) >= GOOD * bound(held, 20)
            assert missing(after, 20) < missing(held, 20)
        held = after
    assert moves(held, 20) == []
    assert capacity(held, 20) > GOOD * bound(held, 20)


def covered(held):
    return covered_of(held, 20)


def covered_of(held, blocks):
    return [sum(h.start <= block < h.stop for h in held) for block in range(blocks)]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(10, 400), st.integers(1, 9))
def test_the_shortfall_of_every_window_is_that_of_the_capacity(seed, rate, count):
    """Where a window leaves none at a demand, the capacity with it is that demand, and the reverse."""
    held = swarm_of(seed)
    demand = 0.8 * bound(held, 20)
    lack = _shortfalls(_single(reach(held, 20))[None], demand, np.array([rate]), np.array([count]))[0]
    for start in range(20 - count + 1):
        with_it = capacity([*held, Holder(PeerId("new"), start, start + count, rate)], 20)
        if abs(with_it - demand) > 1e-3 * demand:
            assert (with_it > demand) == (lack[start] < 1e-2)


def test_a_server_that_everyone_can_spare_fills_the_hole():
    held = [
        Holder(PeerId("a"), 0, 5, 10.0),
        Holder(PeerId("b"), 0, 5, 10.0),
        Holder(PeerId("c"), 6, 12, 10.0),
    ]
    [first, *_] = moves(held, 12)
    assert first.peer in "ab"
    assert first.start <= 5 < first.stop


def test_a_swarm_near_its_bound_rests():
    held = [Holder(PeerId(name), 0, 12, 10.0) for name in "abc"]
    assert moves(held, 12) == []
    assert better_window(held, 12, PeerId("a"), 6, rng=random.Random(0)) is None
    assert better_window(held, 12, PeerId("unknown"), 6, rng=random.Random(0)) is None


def test_a_server_that_is_about_to_move_counts_where_it_goes_and_nobody_relies_on_what_it_leaves():
    stays, goes = span(1, 0, 6), replace(span(2, 0, 6), next_start=2, next_stop=8)
    held = {holder.peer: holder for holder in holders([stays, goes])}
    assert held[goes.peer].rate == pytest.approx(100.0)
    assert held[goes.peer]._replace(rate=100.0) == Holder(goes.peer, 2, 8, 100.0, False)
    assert held[stays.peer].online
    assert opens_gap(held.values(), stays.peer, Blocks(0, 6), Blocks(6, 12))
    assert choose_blocks([goes], 12, 2) == (0, 2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_move_of_the_second_rank_is_made_with_a_chance_of_one_in_four_and_so_on(rank):
    me, times = PeerId("me"), 4000
    ranked = [Move(1.0, PeerId("other"), 0, 3, 0), Move(0.5, me, 3, 6, rank)]
    rng = random.Random(7)
    made = [in_turn(ranked, me, rng) for _ in range(times)]
    assert set(made) <= {(3, 6), None}
    expected = times * RANK_CHANCE**rank
    spread = 4 * (expected * (1 - RANK_CHANCE**rank)) ** 0.5
    assert abs(times - made.count(None) - expected) <= spread
    assert RANK_CHANCE == 0.25


def test_blocks_that_hang_on_one_relay_lack_a_holder():
    relay, other = (peer_id_of(bytes([n]) * 32) for n in (91, 92))

    def behind(number, start, stop, *relays):
        return replace(span(number, start, stop), reach="relayed", relays=relays)

    same = [behind(1, 0, 12, relay), behind(2, 0, 12, relay)]
    assert list(replicas(holders(same), 12, 2)) == [1] * 12
    assert list(replicas(holders([same[0], behind(2, 0, 12, other)]), 12, 2)) == [2] * 12
    assert list(replicas(holders([same[0], span(2, 0, 12)]), 12, 2)) == [2] * 12
    # of two windows that help the capacity alike a newcomer takes the one with blocks that hang on one relay
    left = [behind(1, 0, 6, relay), behind(2, 0, 6, relay), span(3, 6, 12), span(4, 6, 12)]
    right = [span(1, 0, 6), span(2, 0, 6), behind(3, 6, 12, relay), behind(4, 6, 12, relay)]
    assert choose_blocks(left, 12, 6, min_replicas=2) == Blocks(2, 8)
    assert choose_blocks(right, 12, 6, min_replicas=2) == Blocks(4, 10)


def test_a_relayed_server_counts_for_no_more_than_its_relay_carries():
    relay = peer_id_of(bytes([93]) * 32)
    fast = [replace(span(number, 0, 6, 1e-4), reach=reach, relays=relays)
            for number, reach, relays in ((1, "public", ()), (2, "relayed", (relay,)))]  # fmt: skip
    rates = {size: [holder.rate for holder in holders(fast, size)] for size in (0, 8192)}
    assert rates[0] == pytest.approx([10_000, 10_000])
    assert rates[8192] == pytest.approx([10_000, RELAYED_BYTES_PER_SECOND / (2 * 8192) * 6])
    for first, low, high in ((1, 0, 2), (0, 4, 6)):  # a joining server takes the blocks of the relayed one
        held = [replace(fast[first], start=0, stop=6), replace(fast[1 - first], start=6, stop=12)]
        assert low <= choose_blocks(held, 12, 6, seconds_per_block=1e-4, position_bytes=8192).start <= high
