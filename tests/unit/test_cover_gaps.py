"""Who goes to blocks that nobody holds: as few as load the least, and never a gap."""

from __future__ import annotations

import random
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.blocks import Blocks
from routing.names import PeerId
from routing.placement.cover_gaps import (
    SPARE,
    PlannedMove,
    gives_way,
    move_to_cover,
    objection,
    opens_gap,
    plan_moves,
    taken_for_lost,
    watched,
    witnesses,
)
from routing.placement.throughput import Holder

BLOCKS = 8


def span(name: str, start: int, stop: int, online: bool = True) -> Holder:
    return Holder(PeerId(name), start, stop, 1.0, online)


def covered(held: list[Holder], blocks: int = BLOCKS, online: bool = False) -> list[int]:
    counted = [h for h in held if h.online or not online]
    return [sum(h.start <= block < h.stop for h in counted) for block in range(blocks)]


def going(held: list[Holder], blocks: int = BLOCKS) -> dict[str, tuple[int, int]]:
    """Who goes at once."""
    found = plan_moves(held, blocks)
    return {peer: t.blocks for peer, t in found.items() if t.rank == 0 and t.ready}


swarms = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.sampled_from([True, True, False])),
    min_size=1,
    max_size=8,
).map(
    lambda parts: [
        span(f"p{number}", start, min(start + length, BLOCKS), online)
        for number, (start, length, online) in enumerate(parts)
    ]
)


def test_who_is_not_needed_where_it_is_goes_to_the_blocks_that_nobody_holds() -> None:
    found = plan_moves([span("a", 0, 4), span("b", 0, 4)], BLOCKS)
    [first] = [turn for turn in found.values() if turn.rank == 0]
    assert first == PlannedMove(Blocks(4, 8), 0, True)


def test_where_the_first_does_not_go_another_one_may() -> None:
    found = plan_moves([span(name, 0, 4) for name in "abc"], BLOCKS)
    assert sorted(turn.rank for turn in found.values()) == [0, 1, 2]
    assert {turn.blocks for turn in found.values()} == {(4, 8)}
    assert move_to_cover([span(name, 0, 4) for name in "abc"], BLOCKS, PeerId("unknown")) is None


def test_who_is_missed_least_goes_first() -> None:
    spans = [span("a", 0, 2), span("b", 0, 2), span("c", 0, 2), span("d", 2, 4), span("e", 2, 4)]
    spans += [span("f", 4, 6)]
    [(peer, window)] = going(spans).items()
    assert peer in {"a", "b", "c"}
    assert window == (6, 8)


def test_who_has_the_least_to_load_goes_first() -> None:
    spans = [span("a", 0, 6), span("b", 0, 6), span("c", 2, 4), span("d", 5, 7)]
    assert going(spans) == {"d": (6, 8)}


def test_a_wide_hole_is_covered_by_several_at_once() -> None:
    spans = [span("a", 0, 2), span("b", 0, 2), span("c", 0, 2), span("d", 2, 4)]
    found = going(spans)
    assert len(found) == 2
    assert set(found.values()) == {(4, 6), (6, 8)}


def test_where_nobody_can_leave_its_place_another_one_stands_in_first() -> None:
    # c could close the hole at once, but nobody else holds 2:4; a or b can go there first
    spans = [span("a", 0, 2), span("b", 0, 2), span("c", 2, 8), span("f", 4, 6), span("g", 6, 8)]
    first = {peer: turn for peer, turn in plan_moves(spans, 14).items() if turn.rank == 0}
    assert first.pop(PeerId("c")) == PlannedMove(Blocks(8, 14), 0, ready=False)
    [(helper, turn)] = first.items()
    assert helper in {"a", "b"}
    assert turn == PlannedMove(Blocks(2, 4), 0, ready=True)
    now = [h._replace(start=2, stop=4, online=False) if h.peer == helper else h for h in spans]
    assert going(now, 14) == {}, "it is still loading"
    now = [h._replace(online=True) for h in now]
    assert going(now, 14) == {"c": (8, 14)}


def after_all(held: list[Holder], found: Mapping[PeerId, PlannedMove]) -> list[Holder]:
    return [
        h._replace(start=found[h.peer].blocks.start, stop=found[h.peer].blocks.stop) if h.peer in found else h
        for h in held
    ]


def test_a_row_of_servers_moves_up_one_after_the_other() -> None:
    # p and q hold two blocks each, and a hole of two is at the end: q alone reaches it with one block
    # to load, if somebody stands in for what it leaves
    spans = [span("p", 0, 4), span("s", 0, 3), span("q", 4, 8), span("r", 8, 12)]
    blocks, held = 13, spans
    for _ in range(6):
        now = going(held, blocks)
        if not now:
            break
        for peer, (start, stop) in now.items():
            mover = next(h for h in held if h.peer == peer)
            assert not opens_gap(held, mover.peer, mover.blocks, Blocks(start, stop))
        held = [h._replace(start=now[h.peer][0], stop=now[h.peer][1]) if h.peer in now else h for h in held]
    assert 0 not in covered(held, blocks)


def test_blocks_to_which_somebody_is_on_the_way_need_nobody_else() -> None:
    spans = [span("a", 0, 4), span("b", 0, 4), span("c", 4, 8, online=False)]
    assert plan_moves(spans, BLOCKS) == {}


def test_who_has_much_to_load_does_not_keep_away_who_has_little() -> None:
    spans = [span("a", 0, 2), span("b", 0, 2), span("c", 2, 22), span("d", 2, 42, online=False)]
    assert set(going(spans, 24).values()) == {(22, 24)}
    assert going([*spans, span("e", 22, 24, online=False)], 24) == {}, "it will be there soon"


def test_a_joining_peer_does_not_stand_in_for_one_that_leaves() -> None:
    assert going([span("a", 0, 4), span("b", 0, 4, online=False)]) == {}


def test_a_window_slides_as_far_as_others_hold_what_it_leaves() -> None:
    assert going([span("a", 0, 4), span("b", 3, 7)]) == {"b": (4, 8)}


def test_where_everything_is_held_nobody_moves() -> None:
    assert plan_moves([span("a", 0, 8), span("b", 0, 8)], BLOCKS) == {}


@settings(deadline=None)
@given(swarms, st.randoms(use_true_random=False))
def test_all_who_are_ready_may_go_in_any_order_and_no_block_loses_its_last_online_server(
    spans: list[Holder], rng: random.Random
) -> None:
    for rank in range(3):
        ready = [(p, t) for p, t in plan_moves(spans, BLOCKS).items() if t.rank == rank and t.ready]
        held, before = spans, covered(spans, online=True)
        for peer, turn in rng.sample(ready, len(ready)):
            mover = next(h for h in held if h.peer == peer)
            assert turn.blocks.size == mover.blocks.size
            assert not opens_gap(held, peer, mover.blocks, turn.blocks)
            # while it loads it serves what both spans have
            start, stop = max(mover.start, turn.blocks.start), min(mover.stop, turn.blocks.stop)
            held = [h._replace(start=start, stop=max(start, stop)) if h is mover else h for h in held]
            now = covered(held, online=True)
            assert all(n > 0 or b == 0 for n, b in zip(now, before, strict=True))


@settings(deadline=None)
@given(swarms)
def test_a_plan_never_leaves_more_blocks_open(spans: list[Holder]) -> None:
    found = {peer: turn for peer, turn in plan_moves(spans, BLOCKS).items() if turn.rank == 0}
    before, after = covered(spans), covered(after_all(spans, found))
    if all(h.online for h in spans) and found:
        assert after.count(0) < before.count(0)
    assert after.count(0) <= before.count(0)


@settings(deadline=None)
@given(swarms, st.integers(0, 2**32))
def test_everybody_sees_one_plan_whatever_the_order_of_the_records(spans: list[Holder], seed: int) -> None:
    assert plan_moves(random.Random(seed).sample(spans, len(spans)), BLOCKS) == plan_moves(spans, BLOCKS)


@settings(deadline=None)
@given(swarms)
def test_moves_to_open_blocks_end(spans: list[Holder]) -> None:
    held = spans
    for _ in range(30):
        now = going(held)
        if not now:
            break
        held = [
            h._replace(start=now[h.peer][0], stop=now[h.peer][1])
            if h.peer in now
            else h._replace(online=True)
            for h in held
        ]
    assert going(held) == {}


def test_what_a_mover_leaves_must_have_an_online_server() -> None:
    spans = [span("a", 0, 4), span("b", 0, 4), span("c", 4, 8)]
    assert not opens_gap(spans, PeerId("a"), Blocks(0, 4), Blocks(4, 8))
    assert opens_gap(spans, PeerId("c"), Blocks(4, 8), Blocks(0, 4))
    assert not opens_gap(spans, PeerId("c"), Blocks(4, 8), Blocks(4, 8)), "it leaves nothing"
    assert opens_gap([spans[0], span("b", 0, 4, online=False)], PeerId("a"), Blocks(0, 4), Blocks(4, 8))


@given(swarms, st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS))
def test_the_witnesses_of_a_move_hold_what_is_left(spans: list[Holder], start: int, length: int) -> None:
    mover, window = spans[0], Blocks(start, start + length)
    own = mover.blocks
    found = witnesses(spans, mover.peer, own, window)
    asked = [h for h in spans if h.peer in found]
    assert mover.peer not in found
    assert all(h.online for h in asked)
    assert opens_gap(asked, mover.peer, own, window) == opens_gap(spans, mover.peer, own, window)


def test_of_two_that_chose_at_once_the_higher_id_gives_way() -> None:
    before = [span("a", 0, 4), span("b", 0, 4), span("c", 0, 4)]
    now = [span("a", 0, 4), span("b", 4, 8, online=False), span("c", 4, 8, online=False)]
    assert gives_way(before, now, PeerId("c"), Blocks(4, 8)) == "b"
    assert gives_way(before, now, PeerId("b"), Blocks(4, 8)) is None
    assert gives_way(now, now, PeerId("c"), Blocks(4, 8)) is None, "it was known before"
    assert gives_way(before, now, PeerId("c"), Blocks(0, 4)) is None, "elsewhere"
    now[1] = span("b", 3, 7, online=False)
    assert gives_way(before, now, PeerId("c"), Blocks(4, 8)) is None, "block 7 still needs it"


def test_a_move_is_given_up_when_others_have_left() -> None:
    before = [span("a", 0, 4), span("b", 0, 4), span("c", 4, 8)]
    assert objection(before, before, PeerId("a"), Blocks(0, 4), Blocks(4, 8)) is None
    assert "left" in (
        objection(before, [before[0], before[2]], PeerId("a"), Blocks(0, 4), Blocks(4, 8)) or ""
    )


@settings(deadline=None)
@given(swarms, st.integers(0, 12), st.integers(0, 2**32))
def test_watched_is_everybody_whom_few_could_replace_fewest_first(
    spans: list[Holder], most: int, seed: int
) -> None:
    me = spans[0].peer
    mixed = random.Random(seed).sample(spans, len(spans))
    found = watched(mixed, BLOCKS, me, len(spans))
    assert watched(spans, BLOCKS, me, most) == found[:most]
    assert me not in found
    others = {}
    for one in spans:
        without = covered([s for s in spans if s is not one], online=one.online)
        others[one.peer] = min(without[one.start : one.stop])
    assert set(found) == {s.peer for s in spans if s.peer != me and others[s.peer] <= SPARE}
    assert [others[peer] for peer in found] == sorted(others[peer] for peer in found)


def test_where_there_are_many_to_watch_each_server_watches_others() -> None:
    spans = [span(f"s{number}", number, number + 1) for number in range(60)]
    seen = {peer for me in range(20) for peer in watched(spans, 60, PeerId(f"s{me}"), 10)}
    assert len(seen) > 50
    assert len(watched(spans, 60, PeerId("s0"), 10)) == 10


def lost_of(servers: str, *, silent: str) -> frozenset[PeerId]:
    """Of servers with one letter each."""
    return taken_for_lost([PeerId(name) for name in servers], [PeerId(name) for name in silent])


def test_silence_of_most_means_that_we_are_cut_off() -> None:
    assert lost_of("abcd", silent="ab") == {"a", "b"}
    assert lost_of("abcd", silent="abc") == frozenset()
    assert lost_of("ab", silent="ab") == frozenset()
    assert lost_of("a", silent="a") == {"a"}, "of two servers one can only believe in the other's loss"
    assert lost_of("ab", silent="") == frozenset()
