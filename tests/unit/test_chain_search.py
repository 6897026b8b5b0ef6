"""The cheapest chain equals the best of all chains tried one by one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.blocks import Blocks
from routing.chains.search import CostInputs, Hop, NoChain, cheapest_chain
from routing.names import peer_id_of
from routing.view.records import Record
from routing.view.view import RELAYED_BYTES_PER_SECOND, Entry, SwarmView

PEERS = sorted(peer_id_of(bytes([number]) * 32) for number in range(60))


def span(number, start, stop, seconds=0.01, blocks=6, **changes) -> Record:
    return Record(
        peer=PEERS[number],
        role="serve",
        model="m",
        revision="r",
        blocks=blocks,
        start=start,
        stop=stop,
        seconds_per_block=seconds,
        **changes,
    )


def every_chain(spans, blocks):
    """All ways to cover [0, blocks) with parts of spans, no peer twice."""

    def grow(reached, hops):
        if reached == blocks:
            yield hops
            return
        for s in spans:
            if s.start <= reached < s.stop and all(h.peer != s.peer for h in hops):
                for stop in range(reached + 1, s.stop + 1):
                    yield from grow(stop, (*hops, Hop(s.peer, reached, stop)))

    return grow(0, ())


def price(hops, spans, client_rtt, default):
    """What a chain costs, written down a second time and in another way than the code under test."""
    of = {s.peer: s for s in spans}
    told = {**{s.peer: s.rtt for s in spans}, "client": client_rtt}
    fastest = sorted(s.seconds_per_block for s in spans)
    middle = (fastest[(len(fastest) - 1) // 2] + fastest[len(fastest) // 2]) / 2

    def announced(one, two):
        return max([told[a][b] for a, b in ((one, two), (two, one)) if b in told[a]], default=math.inf)

    def between(one, two):
        over = [announced(one, other) + announced(other, two) for other in told if other not in (one, two)]
        known = announced(one, two)
        estimate = known if known < math.inf else min(over, default=math.inf)
        return estimate if estimate < math.inf else default

    way = ["client", *(hop.peer for hop in hops), "client"]
    total = sum(between(one, two) for one, two in itertools.pairwise(way)) / 2
    for hop in hops:
        peer = of[hop.peer]
        total += (hop.stop - hop.start) * max(peer.seconds_per_block, middle / 4) * (1 + peer.queue)
    return total


@st.composite
def swarms(draw):
    """Up to 5 peers over 6 blocks, some distances known, some not."""
    count = draw(st.integers(1, 5))
    seconds = st.sampled_from([0.001, 0.002, 0.01, 0.03, 0.1])
    spans = []
    for number in range(count):
        start = draw(st.integers(0, 5))
        stop = draw(st.integers(start + 1, 6))
        others = st.sampled_from(PEERS[:count])
        rtt = draw(st.dictionaries(others, seconds, max_size=4))
        spans.append(span(number, start, stop, draw(seconds), queue=draw(st.integers(0, 2)), rtt=rtt))
    client_rtt = draw(st.dictionaries(st.sampled_from(PEERS[:count]), seconds, max_size=count))
    return spans, client_rtt


@settings(max_examples=200, deadline=None)
@given(swarms())
def test_the_chain_found_is_the_cheapest_of_all(swarm):
    spans, client_rtt = swarm
    chains = list(every_chain(spans, 6))
    if not chains:
        with pytest.raises(NoChain):
            cheapest_chain(spans, 6, known=CostInputs(client_rtt=client_rtt))
        return
    best = min(price(hops, spans, client_rtt, 0.1) for hops in chains)
    found = cheapest_chain(spans, 6, known=CostInputs(client_rtt=client_rtt))
    assert found.hops in chains
    assert found.expected_seconds == pytest.approx(price(found.hops, spans, client_rtt, 0.1))
    if found.expected_seconds > best + 1e-12:
        # only where a cheaper walk would have come back to a peer, which a chain may not
        assert cheapest_walk_repeats(spans, client_rtt, best)
    else:
        assert found.expected_seconds == pytest.approx(best)


def cheapest_walk_repeats(spans, client_rtt, best):
    """Is there a walk, peers allowed twice, that costs less than the best chain?"""

    def grow(reached, hops):
        if reached == 6:
            yield hops
            return
        for s in spans:
            if s.start <= reached < s.stop and (not hops or hops[-1].peer != s.peer):
                for stop in range(reached + 1, s.stop + 1):
                    yield from grow(stop, (*hops, Hop(s.peer, reached, stop)))

    return any(price(hops, spans, client_rtt, 0.1) < best for hops in grow(0, ()))


@settings(max_examples=50, deadline=None)
@given(swarms(), st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_change_the_chain(swarm, rng):
    spans, client_rtt = swarm
    other = rng.sample(spans, len(spans))
    try:
        chain = cheapest_chain(spans, 6, known=CostInputs(client_rtt=client_rtt))
    except NoChain as none:
        with pytest.raises(NoChain, match=str(none)):
            cheapest_chain(other, 6, known=CostInputs(client_rtt=client_rtt))
        return
    assert cheapest_chain(other, 6, known=CostInputs(client_rtt=client_rtt)) == chain


def test_ties_break_on_the_peer_id():
    spans = [span(n, 0, 6) for n in range(5)]
    for order in itertools.permutations(spans):
        assert cheapest_chain(order, 6).hops == (Hop(PEERS[0], 0, 6),)


def test_a_near_slow_peer_loses_to_a_far_fast_one_once_the_blocks_are_many():
    near, far = span(0, 0, 6, 0.010, rtt={}), span(1, 0, 6, 0.004)
    known = CostInputs(client_rtt={PEERS[0]: 0.001, PEERS[1]: 0.05})
    assert cheapest_chain([near, far], 6, known=known).hops[0].peer == PEERS[0]
    near, far = span(0, 0, 60, 0.010, 60), span(1, 0, 60, 0.004, 60)
    known = CostInputs(client_rtt={PEERS[0]: 0.001, PEERS[1]: 0.05})
    assert cheapest_chain([near, far], 60, known=known).hops[0].peer == PEERS[1]


def test_a_hop_may_use_a_part_of_a_span():
    fast, slow = span(0, 2, 4, 0.001), span(1, 0, 6, 0.003)
    rtt = dict.fromkeys(PEERS[:2], 0.0)
    known = CostInputs(client_rtt=rtt, default_rtt=0.0)
    chain = cheapest_chain([fast, slow, span(2, 3, 6, 0.002)], 6, known=known)
    assert chain.hops == (Hop(PEERS[1], 0, 2), Hop(PEERS[0], 2, 4), Hop(PEERS[2], 4, 6))
    assert chain.expected_seconds == pytest.approx(0.012)


def test_a_chain_may_cover_a_run_of_blocks_only():
    spans = [span(0, 0, 3), span(1, 3, 6)]
    assert cheapest_chain(spans, 6, part=Blocks(1, 3)).hops == (Hop(PEERS[0], 1, 3),)
    assert cheapest_chain(spans, 6, part=Blocks(2, 5)).hops == (Hop(PEERS[0], 2, 3), Hop(PEERS[1], 3, 5))
    for start, stop in ((3, 3), (-1, 2), (0, 7)):
        with pytest.raises(ValueError, match="no part of a model"):
            cheapest_chain(spans, 6, part=Blocks(start, stop))


def test_a_wait_in_the_queue_is_part_of_the_cost():
    spans = [span(0, 0, 6, queue=3), span(1, 0, 6)]
    assert cheapest_chain(spans, 6).hops[0].peer == PEERS[1]


def test_a_queue_that_was_measured_is_not_counted_again():
    spans = [span(0, 0, 6, 0.001, queue=3), span(1, 0, 6, 0.002)]
    known = CostInputs(measured={PEERS[0]: 0.0015}, default_rtt=0.0)  # waits included
    chain = cheapest_chain(spans, 6, known=known)
    assert chain.hops == (Hop(PEERS[0], 0, 6),)
    assert chain.expected_seconds == pytest.approx(0.009)


def test_own_measurements_beat_what_a_peer_announces():
    spans = [span(0, 0, 6, 0.001), span(1, 0, 6, 0.002)]
    assert cheapest_chain(spans, 6).hops[0].peer == PEERS[0]
    assert cheapest_chain(spans, 6, known=CostInputs(measured={PEERS[0]: 0.05})).hops[0].peer == PEERS[1]


def test_a_boastful_peer_gains_at_most_four_times_the_median():
    spans = [span(0, 0, 6, 0.004), span(1, 0, 6, 0.004), span(2, 0, 6, 1e-7)]
    chain = cheapest_chain(spans, 6, known=CostInputs(default_rtt=0.0))
    assert chain.expected_seconds == pytest.approx(6 * 0.001)


def test_many_positions_go_by_the_rate_of_a_prefill():
    quick_decoder = span(0, 0, 6, 0.001, prefill_seconds_per_token=0.003)
    quick_trainer = span(1, 0, 6, 0.002, prefill_seconds_per_token=0.001)
    spans = [quick_decoder, quick_trainer]
    assert cheapest_chain(spans, 6).hops[0].peer == PEERS[0]
    chain = cheapest_chain(spans, 6, known=CostInputs(positions=500, default_rtt=0.0))
    assert chain.hops[0].peer == PEERS[1]
    assert chain.expected_seconds == pytest.approx(6 * 500 * 0.001)
    measured = {PEERS[1]: 500 * 0.004}
    assert (
        cheapest_chain(spans, 6, known=CostInputs(positions=500, measured=measured)).hops[0].peer == PEERS[0]
    )
    boastful = span(2, 0, 6, 0.001, prefill_seconds_per_token=1e-7)
    chain = cheapest_chain([*spans, boastful], 6, known=CostInputs(positions=500, default_rtt=0.0))
    assert chain.expected_seconds == pytest.approx(6 * 500 * 0.001 / 4)


def test_steps_of_our_own_that_are_on_their_way_count_as_waiting_also_where_a_peer_was_measured():
    spans = [span(0, 0, 6, 0.001), span(1, 0, 6, 0.0015)]
    assert cheapest_chain(spans, 6, known=CostInputs(waiting={PEERS[0]: 0})).hops[0].peer == PEERS[0]
    assert cheapest_chain(spans, 6, known=CostInputs(waiting={PEERS[0]: 1})).hops[0].peer == PEERS[1]
    measured = {PEERS[0]: 0.001}
    assert (
        cheapest_chain(spans, 6, known=CostInputs(waiting={PEERS[0]: 1}, measured=measured)).hops[0].peer
        == PEERS[1]
    )


def test_one_peer_cannot_make_itself_near_to_another_alone():
    first = span(0, 0, 3, rtt={PEERS[1]: 0.2, PEERS[2]: 0.1})
    liar, honest = span(1, 3, 6, rtt={PEERS[0]: 0.0}), span(2, 3, 6)
    assert cheapest_chain([first, liar, honest], 6).hops[1].peer == PEERS[2]


def test_excluded_peers_are_not_used():
    spans = [span(0, 0, 6), span(1, 0, 6)]
    assert cheapest_chain(spans, 6, excluded={PEERS[0]}).hops[0].peer == PEERS[1]


def test_no_chain_names_the_blocks_that_nobody_serves():
    with pytest.raises(NoChain, match=r"blocks 10:20, 25:30 of 30 are served by nobody") as caught:
        cheapest_chain([span(0, 0, 10, blocks=30), span(1, 20, 25, blocks=30)], 30)
    assert caught.value.missing == ((10, 20), (25, 30))
    assert not caught.value.alone


def test_no_chain_says_that_there_is_no_peer_at_all():
    with pytest.raises(NoChain, match=r"no peer serves any of blocks 0:30 of 30") as caught:
        cheapest_chain([], 30)
    assert caught.value.alone
    assert caught.value.missing == ((0, 30),)


def test_no_chain_says_how_many_peers_were_left_out():
    with pytest.raises(NoChain, match=r"blocks 3:6 of 6 are served by nobody \(1 left out after a failure\)"):
        cheapest_chain([span(0, 0, 3), span(1, 3, 6)], 6, excluded={PEERS[1], PEERS[9]})


def test_a_peer_that_the_cheapest_walk_would_visit_twice_is_visited_once():
    host = span(0, 0, 6, 0.002)
    quick = span(1, 2, 4, 0.0005)
    rtt = dict.fromkeys(PEERS, 0.0)
    chain = cheapest_chain([host, quick], 6, known=CostInputs(client_rtt=rtt, default_rtt=0.0))
    assert [hop.peer for hop in chain.hops] == [PEERS[0]]
    assert chain.expected_seconds == pytest.approx(0.012)


def test_a_prompt_goes_round_a_relay_and_a_token_through_the_nearer_server():
    """10 ms through a relay, 30 ms to a public server; 512 positions of 8 KiB take 0.67 s at 50 Mbit/s."""
    relayed, public = span(1, 0, 6, reach="relayed", relays=(PEERS[9],)), span(2, 0, 6)
    view = SwarmView("public", entries={each.peer: Entry(each, b"", 0.0) for each in (relayed, public)})
    rtt = {relayed.peer: 0.01, public.peer: 0.03}
    for positions, best in ((1, relayed), (512, public)):
        carrying = {relayed.peer: positions * 8192 / view.relayed_rate(relayed)}
        known = CostInputs(rtt, positions=positions, carrying=carrying)
        chain = cheapest_chain([relayed, public], 6, known=known)
        assert [hop.peer for hop in chain.hops] == [best.peer]
    both = cheapest_chain([relayed], 6, known=CostInputs(rtt, carrying={relayed.peer: 1.0}))
    alone = cheapest_chain([relayed], 6, known=CostInputs(rtt))
    assert both.expected_seconds == pytest.approx(alone.expected_seconds + 2.0)  # there and back


def test_between_two_relayed_servers_the_data_is_carried_once():
    one, two = span(1, 0, 3), span(2, 3, 6)
    known = CostInputs(default_rtt=0.0, carrying={one.peer: 1.0, two.peer: 3.0})
    chain = cheapest_chain([one, two], 6, known=known)
    assert chain.expected_seconds == pytest.approx(0.06 + 1.0 + 3.0 + 3.0)
    known = CostInputs(default_rtt=0.0, carrying={one.peer: 1.0})
    assert cheapest_chain([one, two], 6, known=known).expected_seconds == pytest.approx(0.06 + 1.0 + 1.0)


def test_a_relay_s_own_rate_counts_up_to_the_usual_one():
    slow, fast = (
        Record(peer=PEERS[n], role="bootstrap", helps=True, relay_mbit=mbit) for n, mbit in ((8, 8), (9, 900))
    )
    silent = Record(peer=PEERS[7], role="bootstrap", helps=True)
    records = (slow, fast, silent)
    view = SwarmView("public", entries={each.peer: Entry(each, b"", 0.0) for each in records})

    def rate(*relays):
        return view.relayed_rate(span(1, 0, 6, reach="relayed", relays=tuple(each.peer for each in relays)))

    assert rate(slow) == 1e6
    assert rate(fast) == rate(silent) == rate() == rate(slow, fast) == RELAYED_BYTES_PER_SECOND
    assert view.relayed_rate(span(1, 0, 6)) == math.inf
