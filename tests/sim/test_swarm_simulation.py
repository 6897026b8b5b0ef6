"""The simulated swarm: one seed gives one result, the same fate by every rule, and our placement pays."""

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.swarm.events import Events
from benchmarks.swarm.models import MODELS, Plan, script
from benchmarks.swarm.outcome import GapAccount, Outcome
from benchmarks.swarm.rules import Equal, Ours, Petals, PetalsJoin
from benchmarks.swarm.simulation import Simulation
from benchmarks.swarm.swarm import beside_petals
from routing.names import PeerId
from routing.placement.throughput import Holder

THIN = MODELS["llama-405b"]
# A fifth of it, held as few times each: a simulation of it takes a fiftieth of the time.
SMALL = replace(
    THIN,
    blocks=24,
    kinds=tuple(replace(kind, count=count) for kind, count in zip(THIN.kinds, (2, 2, 3, 3, 8), strict=True)),
)


def test_a_small_swarm_settles_near_its_bound_and_rests():
    plan = Plan(SMALL, servers=12, seed=3, seconds=600.0)
    ours, again, equal = (Simulation(plan, rule()).run() for rule in (Ours, Ours, Equal))
    assert (ours.at_rest, ours.moves, ours.loaded) == (again.at_rest, again.moves, again.loaded)
    assert ours.at_rest > 0.9 > equal.at_rest
    assert ours.uncovered_s == 0
    assert ours.moves <= 3


@pytest.mark.parametrize("seed", range(2))
def test_crashed_servers_are_replaced_gaps_close_and_no_move_opens_one(seed):
    plan = Plan(MODELS["llama-70b"], servers=12, seed=seed, churn=2.0, lost=0.2, seconds=1800.0)
    outcome = Simulation(plan, Ours()).run()
    assert outcome.shares[-1] > 0.5
    assert outcome.loaded > 0
    assert outcome.gaps_opened == 0


def test_the_same_servers_crash_at_the_same_times_whatever_the_rule():
    plan = Plan(SMALL, servers=14, seed=1, churn=1.0, lost=0.2, seconds=1200.0)
    assert script(plan) == script(plan)
    runs = [Simulation(plan, rule()) for rule in (Ours, Petals)]
    for run in runs:
        run.run()
    ours, petals = ({server.peer for server in run.world.servers.values()} for run in runs)
    assert ours == petals


def test_two_parts_that_do_not_see_each_other_come_together_again():
    plan = Plan(MODELS["llama-70b"], servers=16, seed=0, partition=0.5, seconds=3600.0)
    outcome = Simulation(plan, Ours()).run()
    assert outcome.gaps_opened == 0
    assert outcome.shares[-1] > 0.95


def test_noisy_rates_do_not_keep_servers_moving():
    plan = Plan(MODELS["llama-70b"], servers=20, seed=2, noise=0.1, seconds=1800.0)
    outcome = Simulation(plan, Ours()).run()
    assert outcome.moves <= 0.2 * 20 * 0.5
    assert outcome.shares[-1] > 0.97


def holder(name, start, stop, rate=1.0):
    return Holder(PeerId(name), start, stop, rate)


def test_petals_joins_where_the_sorted_throughputs_come_first():
    seen = [holder("a", 0, 4), holder("b", 2, 6)]
    assert PetalsJoin().join(seen, 8, 3, 1.0, random.Random(0)) == (5, 8)


def test_petals_does_not_leave_blocks_that_it_alone_serves():
    seen = [holder("a", 0, 4, 100.0), holder("b", 4, 8, 1.0)]
    assert Petals().move(seen, 8, PeerId("a"), [], random.Random(0)) is None


def test_petals_moves_where_everybody_gains_enough():
    seen = [holder("a", 0, 4), holder("b", 0, 4), holder("c", 0, 4), holder("d", 4, 8)]
    assert Petals().move(seen, 8, PeerId("a"), [], random.Random(0)) == (4, 8)
    even = [*seen[1:], holder("a", 4, 8)]
    assert Petals().move(even, 8, PeerId("a"), [], random.Random(0)) is None
    assert np.isfinite(Simulation(Plan(SMALL, 12, 0, seconds=60.0), Petals()).run().at_rest)


def test_each_seed_is_compared_with_the_better_one_of_petals_rules():
    shares = {"ours": [0.9, 0.8, 0.5], "petals": [0.6, 1.0, 0.0], "petals-join": [0.9, 0.5, 0.25]}
    rows = [{"rule": rule, "share_by_seed": found} for rule, found in shares.items()]
    assert beside_petals(rows) == {"of_petals_least": 0.8, "of_petals_mean": pytest.approx((1 + 0.8 + 2) / 3)}
    assert beside_petals(rows[:1]) == {}


def test_events_of_one_moment_come_in_the_order_in_which_they_were_added():
    events: Events[str] = Events()
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (4.0, "d")):
        events.add(when, name)
    assert [events.take(3.0) for _ in range(4)] == ["a", "b", "c", None]
    assert events.now == 3.0
    assert events.take(4.0) == "d"


def test_a_gap_is_counted_from_its_crash_and_late_only_beyond_a_minute_and_the_load():
    outcome = Outcome()
    gaps = GapAccount(outcome)
    gaps.look(100.0, [3, 4], [3], load=0.0)
    gaps.hopeless(110.0, {4})
    gaps.look(150.0, [4], [4], load=5.0)
    gaps.hopeless(150.0, set())
    gaps.look(170.0, [], [], load=5.0)
    first, second = outcome.repairs
    assert (first.total, first.known, first.load, first.stuck) == (50.0, 50.0, 5.0, 0.0)
    assert (second.total, second.known, second.stuck) == (70.0, 20.0, 40.0)
    assert [(repair.late, repair.late and repair.impossible) for repair in outcome.repairs] == [
        (False, False),
        (True, True),
    ]
    assert outcome.uncovered_s == 70.0
    gaps.look(200.0, [7], [7], load=0.0)
    gaps.pause(230.0)
    assert outcome.uncovered_s == 100.0
    assert [repair.total for repair in outcome.unrepaired] == [30.0]
