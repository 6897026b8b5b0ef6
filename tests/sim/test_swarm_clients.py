"""The simulated clients of `benchmarks swarm`: the counts are those of the events."""

import pytest

from benchmarks.swarm.clients import CHOOSERS, Demand, Machine, figures, serve
from routing.names import peer_id_of
from routing.placement.throughput import Holder, bound, capacity

BLOCKS = 12
PEERS = sorted(peer_id_of(bytes([number]) * 32) for number in range(12))


def machines(lie: float = 1.0) -> list[Machine]:
    """Three for each third of the model, the last of each slower."""
    spans = [(start, start + 4, rate) for start in (0, 4, 8) for rate in (400.0, 400.0, 200.0)]
    return [
        Machine(peer, start, stop, rate, rate * lie if rate == 200.0 else rate)
        for peer, (start, stop, rate) in zip(PEERS, spans, strict=False)
    ]


def can_do(held: list[Machine]) -> float:
    return capacity([Holder(m.peer, m.start, m.stop, m.rate) for m in held], BLOCKS)


def demand(load: float, seed: int = 0, **other: float) -> Demand:
    fields = {"tokens": 30.0, "warm_up": 10.0, "seconds": 30.0, "view_seconds": 10.0} | other
    return Demand(load * can_do(machines()), seed, clients=50, **fields)


@pytest.mark.parametrize("kind", CHOOSERS)
def test_a_swarm_that_is_hardly_used_makes_what_it_is_asked_for(kind):
    served = serve(machines(), BLOCKS, demand(0.1, warm_up=30.0, seconds=60.0), kind)
    assert served.made == pytest.approx(served.asked, rel=0.2)
    fastest = BLOCKS / 400.0
    assert min(served.latencies) > fastest, "no step is quicker than its computing and its ways"
    assert all(count == 3 for count in served.hops)


def test_no_clients_get_more_than_the_capacity():
    for kind in CHOOSERS:
        plan = demand(1.5, warm_up=5.0, seconds=10.0)
        served = serve(machines(), BLOCKS, plan, kind)
        assert served.made / plan.seconds <= can_do(machines()) * 1.001


def test_the_same_seed_gives_the_same_and_another_gives_another():
    one, two, other = (
        serve(machines(), BLOCKS, demand(0.7, seed, warm_up=5.0, seconds=10.0), "ours") for seed in (1, 1, 2)
    )
    assert one == two
    assert one.latencies != other.latencies


def test_all_kinds_of_clients_are_asked_for_the_same():
    assert (
        len(
            {
                serve(machines(), BLOCKS, demand(0.5, warm_up=5.0, seconds=10.0), kind).asked
                for kind in CHOOSERS
            }
        )
        == 1
    )


def test_whoever_does_not_know_of_queues_crowds_at_the_fastest():
    plan = demand(0.9, warm_up=20.0, seconds=40.0)
    ours, petals, best = (serve(machines(), BLOCKS, plan, kind) for kind in ("ours", "petals", "all-seeing"))
    found, theirs = (figures(one, best, plan, can_do(machines())) for one in (ours, petals))
    assert found["latency_p95_s"] < theirs["latency_p95_s"]
    assert found["aggregate_of_asked"] > 0.9


def test_liars_cost_little():
    plan, lying = demand(0.8), machines(lie=100.0)
    honest, lied_to = serve(machines(), BLOCKS, plan, "ours"), serve(lying, BLOCKS, plan, "ours")
    assert lied_to.made > 0.9 * honest.made


def test_the_yardstick_is_what_the_servers_can_do_together():
    held = [Holder(m.peer, m.start, m.stop, m.rate) for m in machines()]
    assert can_do(machines()) == pytest.approx(bound(held, BLOCKS)) == pytest.approx(250.0)
