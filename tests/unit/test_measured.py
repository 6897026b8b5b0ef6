"""Own figures beside claims: who wins, for how long, and what a liar gains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.chains.load_sharing import client_bias
from routing.chains.measured import DOUBTED, HALVES_KEPT, LOCAL_SECONDS, Measured, admitted
from routing.chains.search import CostInputs, cheapest_chain
from routing.view.view import believed_rates
from tests.unit.test_chain_search import PEERS, span

rates = st.floats(1e-5, 10.0)


def known(seconds: float, claimed: float = 0.01, queue: int = 0, at: float = 0.0) -> Measured:
    """A client that has measured peer 0 once."""
    measured = Measured()
    measured.learn(PEERS[0], seconds, span(0, 0, 6, claimed, queue=queue), at)
    return measured


def believed(measured: Measured, now: float, claimed: float = 0.01, queue: int = 0) -> float:
    """Of peer 0, among others that claim 0.01."""
    spans = [span(0, 0, 6, claimed, queue=queue), *(span(number, 0, 6) for number in range(1, 6))]
    return measured.rates(spans, now)[PEERS[0]]


@given(rates, rates)
def test_what_was_just_measured_counts_whatever_is_claimed(seconds, claimed):
    assert believed(known(seconds, claimed), 0.0, claimed) == pytest.approx(seconds)


def test_nothing_is_said_of_peers_that_were_not_measured():
    assert known(0.02).rates([span(1, 0, 6)], 0.0) == {}
    assert Measured().rates([], 0.0) == {}


@given(rates, rates, st.integers(0, 50), st.floats(0, 3000))
def test_a_queue_only_makes_a_peer_slower(seconds, claimed, queue, now):
    measured = known(seconds, claimed)
    assert believed(measured, now, claimed, queue) >= believed(measured, now, claimed) * (1 - 1e-9)


def test_no_queue_where_one_was_felt_makes_a_peer_no_faster():
    measured = known(0.05)  # five times what it claims, and it says that nobody waits
    assert believed(measured, 0.0, queue=0) == pytest.approx(0.05)


def test_an_honest_queue_is_believed():
    measured = known(0.01)
    assert believed(measured, 0.0, queue=4) == pytest.approx(0.05)
    assert not known(0.05, queue=4).decode[PEERS[0]].doubted


def test_who_was_slow_under_load_is_tried_again_some_minutes_later():
    measured = known(0.025)
    assert [round(believed(measured, 60.0 * minutes), 4) for minutes in (0, 2, 4, 10)] == [
        0.025,
        0.0158,
        0.0126,
        0.0103,
    ]


def test_who_was_much_slower_than_claimed_is_doubted_for_longer():
    assert believed(known(0.025), 240.0) == pytest.approx(0.01 * 2.5**0.25)
    assert believed(known(0.05), 240.0) == pytest.approx(0.01 * 5 ** (0.5**0.4))


def test_the_other_claims_of_a_doubted_peer_count_as_so_many_times_slower():
    many = [span(n, 0, 6, prefill_seconds_per_token=0.001) for n in range(3)]
    assert known(0.01 * DOUBTED).rates(many, 0.0, positions=64) == {}
    assert known(0.05).rates(many, 0.0, positions=64) == {PEERS[0]: pytest.approx(64 * 0.005)}
    assert known(0.05).rates(many, 1e9, positions=64) == {PEERS[0]: pytest.approx(64 * 0.001)}
    measured = Measured()
    measured.learn(PEERS[0], 0.1, many[0], 0.0, prefill=True)
    assert measured.rates(many, 0.0) == {PEERS[0]: pytest.approx(1.0)}
    assert measured.rates(many, 0.0, positions=64) == {PEERS[0]: pytest.approx(6.4)}


def test_better_figures_end_the_doubt():
    measured, claims = known(0.05), span(0, 0, 6)
    for step in range(12):
        measured.learn(PEERS[0], 0.01, claims, step / 100)
    assert not measured.decode[PEERS[0]].doubted
    assert believed(measured, 0.12) < 0.02


def test_a_new_figure_counts_the_more_the_older_the_last_one_is():
    for later, expected in ((0.0, 0.018), (120.0, 0.014), (1e6, 0.01)):
        measured = known(0.02)
        measured.learn(PEERS[0], 0.01, span(0, 0, 6), later)
        assert measured.decode[PEERS[0]].seconds == pytest.approx(expected)


def test_a_peer_that_has_left_keeps_what_was_thought_of_it():
    measured = known(0.05)
    measured.learn(PEERS[0], 0.05, None, 1.0)
    assert measured.decode[PEERS[0]].doubted


def test_old_figures_are_forgotten():
    measured = known(0.02)
    measured.learn(PEERS[1], 0.02, span(1, 0, 6), 120.0 * HALVES_KEPT + 1)
    assert set(measured.decode) == {PEERS[1]}


# Time that nobody admits


def test_a_step_whose_time_is_accounted_for_is_as_the_hops_say():
    assert admitted([0.1, 0.2], [3, 6], 0.34, 0.01) == [0.1, 0.2]
    assert admitted([0.0], [6], LOCAL_SECONDS, 0.0) == [0.0]
    assert admitted([0.001], [6, 6], 1.0, 0.0) == [0.001]  # who knows which


def test_what_is_missing_is_laid_to_the_hop_that_says_it_is_the_fastest():
    found = admitted([0.1, 0.001, 0.1], [10, 10, 10], 0.291 + LOCAL_SECONDS, 0.0)
    assert found == [0.1, pytest.approx(0.091), 0.1]
    found = admitted([0.1, 0.001, 0.1], [10, 10, 10], 0.6 + LOCAL_SECONDS, 0.0)
    assert found == [pytest.approx(0.2)] * 3, "more than it can have had: all are made level"


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=6),
    st.floats(0, 5),
    st.floats(0, 0.5),
)
def test_all_that_is_missing_is_laid_to_somebody_and_nobody_is_made_faster(hops, total, network):
    held, blocks = [seconds for seconds, _ in hops], [count for _, count in hops]
    found = admitted(held, blocks, total, network)
    assert all(after >= before for before, after in zip(held, found, strict=True))
    missing = total - sum(held) - 2 * network - LOCAL_SECONDS
    if missing > total / 4:
        assert sum(found) == pytest.approx(sum(held) + missing)


# A liar


@pytest.mark.parametrize("admits", [True, False])
def test_a_liar_has_its_share_and_no_more_after_the_first_step_of_each_client(admits):
    """It says that it is a hundred times as fast as the others, and is as fast as they are; in the
    times that come with the answers it may go on lying."""
    true, rtt, network, clients = 0.01, 0.002, 0.003, 200
    spans = [span(number, start, start + 3) for number in range(20) for start in [3 * (number % 2)]]
    liar = replace(spans[0], seconds_per_block=true / 100)
    spans[0] = liar
    before, after = Counter[str](), Counter[str]()
    for client in range(clients):
        lean = client_bias(f"client {client}", (s.peer for s in spans))
        chain = cheapest_chain(spans, 6, known=CostInputs(default_rtt=rtt), cost_factors=lean)
        before.update(hop.peer for hop in chain.hops)
        blocks = [hop.stop - hop.start for hop in chain.hops]
        says = [
            count * (true if admits or hop.peer != liar.peer else 1e-6)
            for hop, count in zip(chain.hops, blocks, strict=True)
        ]
        took = sum(blocks) * true + 2 * network + LOCAL_SECONDS
        measured = Measured()
        for hop, count, seconds in zip(
            chain.hops, blocks, admitted(says, blocks, took, network), strict=True
        ):
            (record,) = (s for s in spans if s.peer == hop.peer)
            measured.learn(hop.peer, seconds / count, record, 1.0)
        measures = measured.rates(spans, 2.0)
        chain = cheapest_chain(
            spans, 6, known=CostInputs(measured=measures, default_rtt=rtt), cost_factors=lean
        )
        after.update(hop.peer for hop in chain.hops)
    fair = clients / 10  # of those who hold these blocks
    assert before[liar.peer] > 3 * fair
    assert after[liar.peer] < 1.5 * fair


def test_its_claim_counts_as_the_cap_allows_when_the_measurement_is_old():
    spans = [span(0, 0, 6, 1e-4), *(span(number, 0, 6) for number in range(1, 6))]
    capped = believed_rates(spans)[PEERS[0]]
    measured = known(0.01, 1e-4)
    assert measured.rates(spans, 0.0)[PEERS[0]] == pytest.approx(0.01)
    assert measured.rates(spans, 120.0)[PEERS[0]] > 0.008
    assert measured.rates(spans, 1e9)[PEERS[0]] == pytest.approx(capped)
