"""The simulated swarm: one seed gives one result, and placement by capacity pays."""

from benchmarks.swarm_rules import Equal, Ours
from benchmarks.swarm_sim import MODELS, Plan, Simulation


def test_a_small_swarm_settles_near_its_bound_and_rests():
    plan = Plan(MODELS["llama-405b"], servers=30, seed=3, seconds=600.0)
    ours, again, equal = (Simulation(plan, rule()).run() for rule in (Ours, Ours, Equal))
    assert (ours.at_rest, ours.moves, ours.loaded) == (again.at_rest, again.moves, again.loaded)
    assert ours.at_rest > 0.9 > equal.at_rest
    assert ours.uncovered_s == 0
    assert ours.moves <= 1


def test_crashed_servers_are_replaced_and_gaps_close():
    plan = Plan(MODELS["llama-70b"], servers=12, seed=1, churn=2.0, lost=0.2, seconds=1800.0)
    outcome = Simulation(plan, Ours()).run()
    assert outcome.shares[-1] > 0.5
    assert outcome.loaded > 0
