"""More chains than one, and peers that may not be used."""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings

from routing.blocks import Blocks
from routing.chains.alternatives import Constraints, best_chains, longest_session, suitable
from routing.chains.search import CostInputs, NoChain, cheapest_chain
from tests.unit.test_chain_search import PEERS, every_chain, price, span, swarms


@settings(max_examples=100, deadline=None)
@given(swarms())
def test_a_chain_of_few_hops_is_the_cheapest_of_all_that_short(swarm):
    spans, client_rtt = swarm
    chains = list(every_chain(spans, 6))
    for most_hops in (1, 2, 3):
        short = [hops for hops in chains if len(hops) <= most_hops]
        if not short:
            with pytest.raises(NoChain):
                cheapest_chain(spans, 6, known=CostInputs(client_rtt=client_rtt), most_hops=most_hops)
            continue
        found = cheapest_chain(spans, 6, known=CostInputs(client_rtt=client_rtt), most_hops=most_hops)
        assert found.hops in short
        best = min(price(hops, spans, client_rtt, 0.1) for hops in short)
        if most_hops < 3:  # a walk that comes back to a peer takes three
            assert found.expected_seconds == pytest.approx(best)
        else:
            assert found.expected_seconds >= best - 1e-12


def test_no_chain_says_that_all_are_too_long():
    with pytest.raises(NoChain, match=r"blocks 0:6 of 6 take more than 1 hop$"):
        cheapest_chain([span(0, 0, 3), span(1, 3, 6)], 6, most_hops=1)


@settings(max_examples=100, deadline=None)
@given(swarms())
def test_the_first_chain_is_the_cheapest_and_all_differ(swarm):
    spans, client_rtt = swarm
    search = partial(cheapest_chain, spans, 6, known=CostInputs(client_rtt=client_rtt))
    try:
        best = search()
    except NoChain:
        with pytest.raises(NoChain):
            best_chains(search, 3)
        return
    found = best_chains(search, 3)
    assert found[0] == best
    assert len({chain.hops for chain in found}) == len(found) <= 3


def test_alternatives_share_no_peer_where_others_hold_the_same_blocks():
    spans = [span(0, 0, 3), span(1, 3, 6), span(2, 0, 3, 0.02), span(3, 3, 6, 0.02), span(4, 0, 6, 0.5)]
    chains = best_chains(partial(cheapest_chain, spans, 6), 3)
    assert [{hop.peer for hop in chain.hops} for chain in chains] == [
        {PEERS[0], PEERS[1]},
        {PEERS[2], PEERS[3]},
        {PEERS[4]},
    ]


def test_alternatives_share_the_only_holder_and_nothing_else():
    spans = [span(0, 0, 3), span(1, 3, 6), span(2, 3, 6, 0.02)]
    first, second = best_chains(partial(cheapest_chain, spans, 6), 4)[:2]
    assert [hop.peer for hop in first.hops] == [PEERS[0], PEERS[1]]
    assert [hop.peer for hop in second.hops] == [PEERS[0], PEERS[2]]


def test_a_way_around_a_peer_is_found_although_to_come_back_to_it_seems_cheaper():
    spans = [span(0, 0, 3, 0.02, 9), span(1, 2, 8, 0.005, 9), span(2, 3, 6, 0.01, 9), span(3, 6, 9, 0.02, 9)]
    first, second = best_chains(partial(cheapest_chain, spans, 9, known=CostInputs(default_rtt=0.0)), 2)
    assert [hop.peer for hop in first.hops] == [PEERS[0], PEERS[1], PEERS[3]]
    assert [hop.peer for hop in second.hops] == [PEERS[0], PEERS[2], PEERS[3]]


def test_only_peers_that_meet_every_constraint_are_suitable():
    one = span(0, 0, 6, dtype="float32", quantize="int8", adapters=("a",), cache_tokens=100, step_tokens=4096)
    one = replace(one, prompts=True, lora=16)
    other = span(1, 0, 6, dtype="bfloat16", cache_tokens=10, step_tokens=2048)
    spans = [one, other]
    assert suitable(spans, Constraints()) == spans
    for constraints in (
        Constraints(allowed={PEERS[0]}),
        Constraints(blocked={PEERS[1]}),
        Constraints(dtypes={"float32"}),
        Constraints(quantize={"int8"}),
        Constraints(adapter="a"),
        Constraints(cache_tokens=100),
        Constraints(step_tokens=4096),
        Constraints(prompts=True),
        Constraints(lora=16),
    ):
        assert suitable(spans, constraints) == [one]


def test_an_adapter_is_known_by_its_name_with_or_without_digits_and_by_its_id():
    poems = "0123456789abcdef" + 48 * "0"
    one = span(0, 0, 6, adapters=("poems#0123456789abcdef", "prose#ffffffffffffffff"))
    for adapter in ("poems", "poems#0123456789abcdef", poems, "prose"):
        assert suitable([one], Constraints(adapter=adapter)) == [one]
    for adapter in ("poem", "poems#", "poems#ffffffffffffffff", "0" * 64, "0123456789abcdef"):
        assert suitable([one], Constraints(adapter=adapter)) == []


@pytest.mark.parametrize(
    ("servers", "longest"),
    [
        ([(0, 6, 100)], 100),
        ([(0, 3, 100), (3, 6, 40)], 40),
        ([(0, 3, 100), (3, 6, 40), (2, 6, 70)], 70),
        ([(0, 4, 100), (4, 6, 90), (0, 6, 80)], 90),
        ([(0, 3, 100)], None),  # blocks that nobody serves
        ([(0, 3, 100), (4, 6, 100)], None),
        ([(0, 6, 0), (0, 6, 100)], None),  # one that does not say may take any
        ([(0, 3, 0), (3, 6, 100)], 100),
        ([], None),
    ],
)
def test_the_longest_session_is_that_of_the_chain_whose_least_server_takes_most(servers, longest):
    spans = [span(i, start, stop, session_tokens=most) for i, (start, stop, most) in enumerate(servers)]
    assert longest_session(spans, Blocks(0, 6)) == longest


@pytest.mark.parametrize(
    ("servers", "longest"),
    [
        ([(0, 6, 100), (3, 5, 200)], 200),
        ([(0, 2, 500), (2, 4, 100), (4, 6, 40)], 40),  # one server has nothing of the run
        ([(3, 5, 70)], 70),  # other blocks have no server
        ([(0, 4, 100), (5, 6, 100)], None),
        ([(0, 3, 100), (5, 6, 100)], None),
    ],
)
def test_the_longest_session_over_a_run_is_that_of_the_run_s_servers(servers, longest):
    spans = [span(i, start, stop, session_tokens=most) for i, (start, stop, most) in enumerate(servers)]
    assert longest_session(spans, Blocks(3, 5)) == longest


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"allowed": ["demo-1"]}, r"allowed holds 'demo-1', which is no peer id"),
        ({"blocked": [PEERS[0], "12D3"]}, r"blocked holds '12D3', which is no peer id"),
        ({"blocked": [""]}, r"blocked holds '', which is no peer id"),
        ({"blocked": PEERS[0]}, r"blocked is the text '12D3\w+', a collection of peer ids is needed"),
        ({"allowed": []}, r"allowed names no peer: leave it out \(None\) to allow all"),
        ({"allowed": PEERS[:2], "blocked": PEERS[1:3]}, rf"allowed and blocked both name {PEERS[1]}"),
        ({"dtypes": ["fp32"]}, r"dtypes holds 'fp32', a collection of float32, bfloat16, float16 is allowed"),
        ({"dtypes": "float32"}, r"dtypes holds 'float32', a collection of"),
        ({"quantize": ["int4"]}, r"quantize holds 'int4', a collection of none, int8, nf4 is allowed"),
        ({"quantize": []}, r"quantize holds nothing"),
        ({"cache_tokens": -1}, r"cache_tokens is -1, a whole number of at least 0 is needed"),
        ({"step_tokens": -1}, r"step_tokens is -1, a whole number of at least 0 is needed"),
        ({"prompts": 1}, r"prompts is 1, True or False is needed"),
        ({"most_hops": 0}, r"most_hops is 0, a whole number of at least 1 is needed"),
    ],
)
def test_constraints_that_nothing_can_meet_are_refused_with_what_is_allowed(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        Constraints(**wrong).check()


def test_constraints_that_can_be_met_are_taken():
    Constraints().check()
    Constraints(
        allowed=PEERS[:2],
        blocked={PEERS[2]},
        dtypes=("float32",),
        quantize={"none", "int8"},
        cache_tokens=1,
        most_hops=1,
    ).check()
