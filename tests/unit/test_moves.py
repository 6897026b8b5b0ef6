"""Who goes to blocks that nobody holds: one peer, to whom it costs the swarm the least, and never a gap."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from routing.moves import Turn, gives_way, opens_gap, turn_to_cover
from routing.names import PeerId
from routing.records import Record, State
from routing.swarm import coverage

BLOCKS = 8


def span(name: str, start: int, stop: int, state: State = "online") -> Record:
    return Record(peer=PeerId(name), role="serve", blocks=BLOCKS, start=start, stop=stop, state=state)


def turns(spans: list[Record]) -> dict[str, Turn]:
    found = {record.peer: turn_to_cover(spans, BLOCKS, record.peer) for record in spans}
    return {peer: turn for peer, turn in found.items() if turn is not None}


swarms = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS), st.sampled_from(["online", "joining"])),
    min_size=1,
    max_size=8,
).map(
    lambda parts: [
        span(f"p{number}", start, min(start + length, BLOCKS), state)  # type: ignore[arg-type]
        for number, (start, length, state) in enumerate(parts)
    ]
)


def test_who_is_not_needed_where_it_is_goes_to_the_blocks_that_nobody_holds():
    spans = [span("a", 0, 4), span("b", 0, 4)]
    found = turns(spans)
    assert {(turn.start, turn.stop) for turn in found.values()} == {(4, 8)}
    assert sorted(turn.rank for turn in found.values()) == [0, 1]


def test_who_is_missed_least_goes_first():
    spans = [span("a", 0, 2), span("b", 0, 2), span("c", 0, 2), span("d", 2, 4), span("e", 2, 4)]
    spans += [span("f", 4, 6)]
    found = turns(spans)
    assert {peer for peer, turn in found.items() if turn.rank < 3} == {"a", "b", "c"}
    assert "f" not in found


def test_blocks_to_which_somebody_is_on_the_way_need_nobody_else():
    spans = [span("a", 0, 4), span("b", 0, 4), span("c", 4, 8, "joining")]
    assert turns(spans) == {}


def test_a_joining_peer_does_not_stand_in_for_one_that_leaves():
    assert turns([span("a", 0, 4), span("b", 0, 4, "joining")]) == {}


def test_a_window_slides_as_far_as_others_hold_what_it_leaves():
    found = turns([span("a", 0, 4), span("b", 1, 7)])
    assert {peer: (turn.start, turn.stop) for peer, turn in found.items()} == {"b": (2, 8)} or found == {}
    found = turns([span("a", 0, 4), span("b", 3, 7)])
    assert found == {"b": Turn(4, 8, 0)}


def test_where_everything_is_held_nobody_moves():
    assert turns([span("a", 0, 8), span("b", 0, 8)]) == {}


@given(swarms)
def test_a_turn_opens_no_gap_and_leaves_fewer_blocks_open(spans):
    for peer, turn in turns(spans).items():
        mover = next(record for record in spans if record.peer == peer)
        assert not opens_gap(spans, mover, turn.start, turn.stop)
        after = [replace(r, start=turn.start, stop=turn.stop) if r is mover else r for r in spans]
        assert coverage(after, BLOCKS).count(0) < coverage(spans, BLOCKS).count(0)
        assert turn.stop - turn.start == mover.stop - mover.start


@given(swarms, st.integers(0, 2**32))
def test_everybody_sees_one_order_whatever_the_order_of_the_records(spans, seed):
    found = turns(spans)
    assert sorted(turn.rank for turn in found.values()) == list(range(len(found)))
    assert turns(random.Random(seed).sample(spans, len(spans))) == found


def test_what_a_mover_leaves_must_have_an_online_server():
    spans = [span("a", 0, 4), span("b", 0, 4), span("c", 4, 8)]
    assert not opens_gap(spans, spans[0], 4, 8)
    assert opens_gap(spans, spans[2], 0, 4)
    assert not opens_gap(spans, spans[2], 4, 8), "it leaves nothing"
    assert opens_gap([spans[0], span("b", 0, 4, "joining")], spans[0], 4, 8)


def test_of_two_that_chose_at_once_the_higher_id_gives_way():
    before = [span("a", 0, 4), span("b", 0, 4), span("c", 0, 4)]
    now = [span("a", 0, 4), span("b", 4, 8, "joining"), span("c", 4, 8, "joining")]
    assert gives_way(before, now, PeerId("c"), 4, 8) == "b"
    assert gives_way(before, now, PeerId("b"), 4, 8) is None
    assert gives_way(now, now, PeerId("c"), 4, 8) is None, "it was known before"
    assert gives_way(before, now, PeerId("c"), 0, 4) is None, "elsewhere"
