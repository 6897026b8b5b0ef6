"""The view of the swarm: a fold whose result depends on what was heard, not on the order."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from routing.names import peer_id_of, public_key_of
from routing.view.records import Record
from routing.view.view import (
    ONLINE_SOON,
    REMEMBER_SECONDS,
    Arrival,
    SwarmView,
    believed_rates,
    expire,
    likely_adjacent,
    merge,
)
from tensor_codec.limits import Limits

PEERS = [peer_id_of(bytes([number]) * 32) for number in range(40)]


def span(number: int, start: int = 0, stop: int = 10, **changes) -> Record:
    """A plausible record of peer `number`, without a signature: the view takes verified records."""
    record = Record(
        peer=PEERS[number],
        addresses=("/ip4/192.0.2.1/tcp/4001",),
        role="serve",
        model="m",
        revision="r",
        blocks=30,
        start=start,
        stop=stop,
        dtype="float32",
        seconds_per_block=0.001,
        prefill_seconds_per_token=0.0001,
        seq=1,
    )
    return replace(record, **changes)


def arrival(record: Record, age: float = 0.0) -> Arrival:
    return Arrival(record, f"{record.peer} {record.seq}".encode(), age)


def view_of(*records: Record, now: float = 0.0) -> SwarmView:
    return merge(SwarmView("public"), map(arrival, records), now).view


def test_a_higher_seq_replaces_and_an_equal_or_lower_one_is_dropped():
    view = view_of(span(0, seq=5, stop=10))
    for seq in (0, 4, 5):
        view, changed = merge(view, [arrival(span(0, seq=seq, stop=20))], 1.0)
        assert changed == ()
        assert view.get(PEERS[0]).stop == 10
    view, changed = merge(view, [arrival(span(0, seq=6, stop=20))], 1.0)
    assert changed == (PEERS[0],)
    assert view.get(PEERS[0]).stop == 20


def test_a_record_lives_for_its_ttl_from_receipt_on_our_clock():
    view = view_of(span(0, ttl_seconds=90.0), now=1000.0)
    assert expire(view, 1089.999) is view
    assert expire(view, 1090.0).records() == ()


def test_no_record_lives_longer_than_its_reader_allows_whatever_its_peer_says():
    view = view_of(span(0, ttl_seconds=3600.0), now=1000.0)
    assert view.life_seconds == Limits().record_life_seconds == 90.0
    assert expire(view, 1089.999).get(PEERS[0])
    assert expire(view, 1090.0).records() == ()


def test_an_announcement_starts_the_ttl_again():
    view = view_of(span(0, seq=1))
    view = merge(view, [arrival(span(0, seq=2))], 60.0).view
    assert expire(view, 149.0).get(PEERS[0])
    assert not expire(view, 150.0).get(PEERS[0])


def test_a_record_passed_on_keeps_its_age():
    view = merge(SwarmView("public"), [arrival(span(0), age=80.0)], 500.0).view
    assert expire(view, 509.0).get(PEERS[0])
    assert not expire(view, 510.0).get(PEERS[0])
    assert [passed.age for passed in view.missing({}, 505.0)] == [85.0]


def test_a_record_whose_ttl_has_already_passed_is_not_taken_in():
    assert merge(SwarmView("public"), [arrival(span(0), age=90.0)], 500.0).changed == ()


def test_a_record_that_ran_out_does_not_come_back_whatever_age_is_claimed():
    view = expire(view_of(span(0, seq=7)), 91.0)
    for seq in (6, 7):
        assert merge(view, [arrival(span(0, seq=seq), age=0.0)], 92.0).changed == ()
    assert merge(view, [arrival(span(0, seq=8))], 92.0).changed == (PEERS[0],)


def test_what_ran_out_is_forgotten_in_the_end():
    view = expire(view_of(span(0, seq=7)), 91.0)
    view = merge(view, [arrival(span(1))], 95.0).view
    later = 90.0 + REMEMBER_SECONDS + 96.0
    assert public_key_of(PEERS[0]) not in expire(view, later).digest()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32))
def test_gossip_in_circles_cannot_keep_a_dead_peer_alive(nodes, seed):
    """A killed peer is gone from every view within its TTL and the delays on the way."""
    rng = random.Random(seed)
    delay = 0.05
    views = [SwarmView("public") for _ in range(nodes)]
    views[0] = merge(views[0], [arrival(span(0, ttl_seconds=30.0))], 0.0).view
    moves = 0
    for tick in range(1, 800):
        now = tick * 0.1
        one, other = rng.sample(range(nodes), 2)
        passed = views[one].missing(views[other].digest(), now)
        views[other], changed = merge(views[other], passed, now + delay)
        moves += len(changed)
        if now > 30.0 + delay * nodes:
            assert all(expire(view, now).records() == () for view in views)
    assert moves <= nodes - 1  # each node took it in once


def test_a_peer_that_left_is_not_in_the_view_and_older_news_of_it_is_dropped():
    view = view_of(span(0, seq=5))
    view = merge(view, [arrival(span(0, seq=6, state="offline"))], 10.0).view
    assert view.get(PEERS[0]) is None
    assert view.records() == ()
    assert merge(view, [arrival(span(0, seq=5))], 11.0).changed == ()
    assert public_key_of(PEERS[0]) in view.digest()  # and the others are told, until the tombstone's own TTL
    assert [passed.record.state for passed in view.missing({}, 12.0)] == ["offline"]
    assert merge(expire(view, 101.0), [arrival(span(0, seq=5))], 101.0).changed == ()


def test_a_record_of_another_swarm_changes_nothing():
    view = SwarmView("public")
    assert merge(view, [arrival(span(0, swarm="f00d"))], 0.0) == (view, ())


def test_a_full_view_refuses_new_peers_and_still_hears_those_it_knows():
    view = SwarmView("public", max_records=3)
    view = merge(view, (arrival(span(n)) for n in range(5)), 0.0).view
    assert set(view.entries) == set(PEERS[:3])
    assert merge(view, [arrival(span(4))], 1.0).changed == ()
    assert merge(view, [arrival(span(1, seq=2))], 1.0).changed == (PEERS[1],)


def test_a_full_view_makes_room_of_what_has_run_out():
    view = SwarmView("public", max_records=2)
    view = merge(view, [arrival(span(0, ttl_seconds=10.0)), arrival(span(1))], 0.0).view
    view, changed = merge(view, [arrival(span(2))], 11.0)
    assert changed == (PEERS[2],)
    assert set(view.entries) == {PEERS[1], PEERS[2]}


def test_what_is_remembered_of_ended_records_is_bounded():
    view = SwarmView("public", max_records=2)
    for number in range(6):
        view = merge(view, [arrival(span(number, ttl_seconds=1.0))], number * 2.0).view
    view = expire(view, 20.0)
    assert set(view.ended) == {PEERS[4], PEERS[5]}


news = st.builds(
    lambda number, seq, state, stop: span(number, seq=seq, state=state, stop=stop),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from(["online", "draining", "offline"]),
    st.integers(1, 30),
)


@given(st.lists(news, max_size=12, unique_by=lambda r: (r.peer, r.seq)), st.randoms(use_true_random=False))
def test_the_view_does_not_depend_on_the_order_of_arrival(records, rng):
    shuffled = rng.sample(records, len(records))
    one_by_one = SwarmView("public")
    for record in shuffled:
        one_by_one = merge(one_by_one, [arrival(record)], 5.0).view
    at_once = view_of(*records, now=5.0)
    assert one_by_one == at_once
    for peer, found in itertools.groupby(sorted(records, key=lambda r: r.peer), key=lambda r: r.peer):
        assert at_once.entries[peer].record.seq == max(record.seq for record in found)


@given(st.lists(news, max_size=10), st.lists(news, max_size=10))
def test_two_peers_that_exchange_digests_and_what_is_missing_agree(ours, theirs):
    ours = [r for i, r in enumerate(ours) if (r.peer, r.seq) not in {(x.peer, x.seq) for x in ours[:i]}]
    theirs = [replace(r, seq=r.seq + 10) for r in theirs]
    theirs = [r for i, r in enumerate(theirs) if (r.peer, r.seq) not in {(x.peer, x.seq) for x in theirs[:i]}]
    a, b = view_of(*ours), view_of(*theirs)
    from_a, from_b = a.missing(b.digest(), 1.0), b.missing(a.digest(), 1.0)
    a, b = merge(a, from_b, 1.0).view, merge(b, from_a, 1.0).view
    assert {p: e.record for p, e in a.entries.items()} == {p: e.record for p, e in b.entries.items()}
    assert a.missing(b.digest(), 1.0) == b.missing(a.digest(), 1.0) == []


def test_a_peer_whose_clock_went_back_is_shown_its_own_last_record():
    view, key = expire(view_of(span(0, seq=100)), 95.0), public_key_of(PEERS[0])
    assert [passed.record.seq for passed in view.missing({key: 3}, 95.0, asker=PEERS[0])] == [100]
    assert view.missing({key: 3}, 95.0, asker=PEERS[1]) == []  # nobody else is told of the dead
    assert view.missing({key: 101}, 95.0, asker=PEERS[0]) == []


class ViewMachine(RuleBasedStateMachine):
    """The view against a list of everything heard, worked out from scratch each time."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.view = SwarmView("public")
        self.best: dict[str, tuple[Record, float]] = {}

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(number=st.integers(0, 3), seq=st.integers(0, 20), age=st.sampled_from([0.0, 1.0, 9.0, 20.0]))
    def a_record_comes(self, number, seq, age):
        record = span(number, seq=seq, ttl_seconds=10.0 + number)
        self.view, changed = merge(self.view, [arrival(record, age)], self.now)
        known = self.best.get(record.peer)
        fresh = age < record.ttl_seconds and (known is None or seq > known[0].seq)
        assert bool(changed) == fresh
        if fresh:
            self.best[record.peer] = (record, self.now - age)

    @rule()
    def what_ran_out_is_dropped(self):
        self.view = expire(self.view, self.now)

    @invariant()
    def the_living_are_known(self):
        living = {p: r for p, (r, sent) in self.best.items() if self.now < sent + r.ttl_seconds}
        assert {r.peer: r for r in expire(self.view, self.now).records()} == living


TestViewMachine = ViewMachine.TestCase
TestViewMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_spans_are_the_online_servers_of_one_model_revision():
    view = view_of(
        span(0),
        span(1, start=10, stop=20, state="joining"),
        span(2, state="draining"),
        span(3, revision="other"),
        span(4, model="other"),  # the same content under another name
        span(5, blocks=12),
        Record(peer=PEERS[6], role="bootstrap", seq=1),
        span(7, state="offline"),
    )
    assert {s.peer for s in view.spans("r")} == {PEERS[0], PEERS[4], PEERS[5]}
    assert {s.peer for s in view.spans("r", 30)} == {PEERS[0], PEERS[4]}
    assert {s.peer for s in view.spans("r", 30, ONLINE_SOON)} == {PEERS[0], PEERS[1], PEERS[4]}
    assert set(view.models()) == {("m", "r", 30), ("m", "r", 12), ("m", "other", 30), ("other", "r", 30)}
    assert len(view.records()) == 7


def test_a_claimed_rate_is_believed_up_to_four_times_the_median_until_it_is_measured():
    spans = [span(n, seconds_per_block=s) for n, s in enumerate([0.004, 0.004, 0.004, 1e-6])]
    assert believed_rates(spans)[PEERS[3]] == pytest.approx(0.001)
    assert believed_rates(spans, {PEERS[3]: 2e-6})[PEERS[3]] == 2e-6
    assert believed_rates([]) == {}


def test_likely_adjacent_peers_hold_the_next_block_before_those_that_only_overlap():
    me = span(0, 0, 10)
    view = view_of(me, span(1, 10, 20), span(2, 5, 15), span(3, 20, 30), span(4, 5, 10), span(5, 0, 10))
    assert {s.peer for s in likely_adjacent(view, me, 2)} == {PEERS[1], PEERS[2]}
    assert [s.peer for s in likely_adjacent(view, me, 9)][2:] == [PEERS[4]]


def test_a_peer_that_moves_is_adjacent_to_those_where_it_goes():
    me = replace(span(0, 0, 10), next_start=10, next_stop=20)
    view = view_of(me, span(1, 10, 20), span(2, 20, 30), replace(span(3, 20, 30), next_start=0, next_stop=10))
    assert [s.peer for s in likely_adjacent(view, me, 9)] == [PEERS[2], PEERS[3]]


def test_predecessors_are_adjacent_like_successors():
    last = span(3, 20, 30)
    view = view_of(span(0, 10, 20), span(1, 15, 25), last, span(2, 0, 10), span(4, 20, 25), span(5, 20, 30))
    assert [s.peer for s in likely_adjacent(view, last, 9)] == [PEERS[0], PEERS[1], PEERS[4]]


def test_of_many_adjacent_peers_half_come_before_and_half_behind():
    me = span(0, 10, 20)
    view = view_of(
        me,
        *(span(n, 20, 30) for n in range(1, 6)),
        *(span(n, 0, 10) for n in range(6, 10)),
        span(10, 0, 30),  # before and behind: once
    )
    chosen = likely_adjacent(view, me, 6)
    assert sorted((s.start, s.stop) for s in chosen) == [(0, 10)] * 3 + [(20, 30)] * 3
    assert len(likely_adjacent(view, me, 16)) == 10
