"""Clients that decide by themselves do not all decide the same."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.blocks import coverage
from routing.chains.load_sharing import MIN_HOLDERS, QUEUE_PENALTY, client_bias, queue_markup, sample
from routing.chains.search import cheapest_chain
from routing.names import peer_id_of
from routing.view.records import Record

PEERS = sorted(peer_id_of(number.to_bytes(2, "big") * 16) for number in range(300))


def span(number, start, stop, seconds=0.01) -> Record:
    return Record(peer=PEERS[number], blocks=12, start=start, stop=stop, seconds_per_block=seconds)


def choices(spans, clients):
    """How many of these clients take each peer as the first of their chain."""
    chains = [
        cheapest_chain(spans, 12, cost_factors=client_bias(f"client {c}", PEERS)) for c in range(clients)
    ]
    return Counter(chain.hops[0].peer for chain in chains)


def test_of_equal_peers_each_client_takes_its_own():
    taken = choices([span(number, 0, 12) for number in range(5)], 200)
    assert len(taken) == 5
    assert max(taken.values()) < 70  # 40 each on average


def test_one_client_decides_the_same_every_time():
    assert client_bias("me", PEERS) == client_bias("me", reversed(PEERS))


def test_a_clearly_better_peer_is_everybodys():
    spans = [span(number, 0, 12, 0.1) for number in range(4)] + [span(4, 0, 12, 0.001)]
    spans += [span(number, 0, 12, 0.002) for number in range(5, 12)]
    assert not choices(spans, 50).keys() & set(PEERS[:4])


def test_one_that_claims_a_hundred_times_its_speed_draws_what_four_times_the_median_would():
    honest = [span(number, 0, 12) for number in range(9)]
    liar, fast = span(9, 0, 12, 0.0001), span(9, 0, 12, 0.0025)
    assert choices([*honest, liar], 100) == choices([*honest, fast], 100)


def test_the_expected_seconds_are_not_those_of_the_bias():
    spans = [span(0, 0, 12)]
    assert cheapest_chain(spans, 12, cost_factors={PEERS[0]: 3.0}) == cheapest_chain(spans, 12)


def test_a_queue_is_minded_more_than_its_wait_but_no_more_than_the_toll():
    idle, busy, crowded = (Record(peer=PEERS[n], queue=queue) for n, queue in enumerate((0.0, 1.0, 1e6)))
    shy = queue_markup([idle, busy, crowded])
    assert shy[PEERS[0]] == 1.0
    assert shy[PEERS[1]] == (1 + QUEUE_PENALTY) / 2
    assert QUEUE_PENALTY - 0.01 < shy[PEERS[2]] < QUEUE_PENALTY


def test_few_peers_are_all_looked_at():
    spans = [span(number, 0, 12) for number in range(20)]
    assert sample(spans, "me", most=20) == spans


SPANS = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.sampled_from([0.001, 0.01, 0.1])))


@settings(max_examples=100, deadline=None)
@given(SPANS, st.randoms(use_true_random=False))
def test_a_sample_leaves_no_block_bare(spans, rng):
    records = [span(n, start, min(start + length, 12), s) for n, (start, length, s) in enumerate(spans)]
    looked_at = sample(records, "me", most=5, always={PEERS[1]})
    assert set(looked_at) == set(sample(rng.sample(records, len(records)), "me", most=5, always={PEERS[1]}))
    assert len(records) < 2 or records[1] in looked_at
    for few, held in zip(coverage(looked_at, 12), coverage(records, 12), strict=True):
        assert few >= min(held, MIN_HOLDERS)


def test_a_sample_has_more_fast_peers_than_slow_ones_and_differs_between_clients():
    spans = [span(number, 0, 12, 0.001 if number % 2 else 0.01) for number in range(300)]
    looked_at = sample(spans, "me", most=40)
    assert sum(one.seconds_per_block == 0.001 for one in looked_at) > 30
    assert set(looked_at) != set(sample(spans, "you", most=40))


def test_peers_that_have_answered_are_considered_before_any_number_of_others():
    spans = [span(number, 0, 12, 0.01) for number in range(100)]
    answering = set(PEERS[50:60])
    looked_at = sample(spans, "me", most=20, answering=answering)
    assert answering <= {one.peer for one in looked_at}
    assert len(looked_at) == 20


def test_a_false_claim_draws_no_more_than_four_times_the_median():
    spans = [span(number, 0, 12, 0.01) for number in range(290)]
    liars = [span(number, 0, 12, 1e-7) for number in range(290, 300)]
    fast = [span(number, 0, 12, 0.0025) for number in range(290, 300)]
    of_liars = {one.peer for one in sample([*spans, *liars], "me", most=40)}
    assert of_liars == {one.peer for one in sample([*spans, *fast], "me", most=40)}
    assert len(of_liars) == 40


def at(record: Record, host: str) -> Record:
    return replace(record, addresses=(f"/ip4/{host}/tcp/4001",))


def test_one_network_has_at_most_half_of_the_places_while_there_are_others():
    crowd = [at(span(number, 0, 12, 0.001), f"9.9.9.{number}") for number in range(200)]
    others = [at(span(number, 0, 12, 0.01), f"8.8.{number - 200}.8") for number in range(200, 300)]
    looked_at = sample([*crowd, *others], "me", most=40)
    assert sum(one in crowd for one in looked_at) == 20
    assert len(sample(crowd, "me", most=40)) == 40  # there is nobody else
    at_home = [at(one, "192.168.1.7") for one in crowd]
    assert sum(one in at_home for one in sample([*at_home, *others], "me", most=40)) > 30
