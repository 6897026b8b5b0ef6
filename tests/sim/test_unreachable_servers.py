"""A swarm part of which nobody can dial: servers join one by one, and others serve every block."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from client.chains.considered import Considered
from routing.blocks import coverage
from routing.chains.search import CostInputs, cheapest_chain
from routing.names import peer_id_of
from routing.placement.rebalance import choose_blocks, holders, replicas
from routing.view.records import Reach, Record
from routing.view.view import ONLINE_SOON, Arrival, SwarmView, merge

BLOCKS, COUNT, SERVERS = 24, 6, 16
REVISION = "r"


def swarm_of(seed: int, kinds: list[Reach]) -> SwarmView:
    """A view of servers, each of which has chosen its blocks when it saw those before it."""
    rng = random.Random(seed)
    view = SwarmView("public")
    relays = [peer_id_of(bytes([200 + n]) * 32) for n in range(2)]
    for number, kind in enumerate(kinds):
        known = view.spans(REVISION, BLOCKS, ONLINE_SOON)
        start, stop = choose_blocks(known, BLOCKS, COUNT, rng, seconds_per_block=0.01)
        record = Record(
            peer=peer_id_of(bytes([number + 1]) * 32), role="serve", model="m", revision=REVISION,
            blocks=BLOCKS,
            start=start, stop=stop, seconds_per_block=0.01, prefill_seconds_per_token=0.001, reach=kind,
            relays=(rng.choice(relays),) if kind == "relayed" else (), seq=1,
        )  # fmt: skip
        view = merge(view, [Arrival(record, b"")], 0.0).view
    return view


def kinds_of(seed: int, share: float) -> list[Reach]:
    rng = random.Random(seed)
    found: list[Reach] = ["none" if rng.random() < share else "public" for _ in range(SERVERS)]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_servers_that_nobody_reaches_cover_no_block_and_the_others_serve_the_model(seed: int) -> None:
    kinds = kinds_of(seed, 0.5)
    view = swarm_of(seed, kinds)
    spans = view.spans(REVISION, BLOCKS)
    assert all(span.reach == "public" for span in spans)
    if kinds.count("public") < BLOCKS // COUNT:
        return
    assert min(coverage(spans, BLOCKS)) >= 1
    chain = cheapest_chain(spans, BLOCKS)
    reached = {record.peer for record in view.records() if record.reach == "public"}
    assert {hop.peer for hop in chain.hops} <= reached


@pytest.mark.parametrize("seed", range(10))
def test_no_block_hangs_on_one_relay_while_servers_are_plenty(seed: int) -> None:
    kinds: list[Reach] = [("relayed", "public")[number % 2] for number in range(SERVERS)]
    held = holders(swarm_of(seed, kinds).spans(REVISION, BLOCKS))
    assert replicas(held, BLOCKS, 2).min() >= 2


def test_a_server_becomes_part_of_the_swarm_when_it_is_reached() -> None:
    view = swarm_of(0, ["none"] * 4)
    assert view.spans(REVISION, BLOCKS) == ()
    records = [replace(record, reach="public", seq=2) for record in view.records()]
    view = merge(view, [Arrival(record, b"") for record in records], 1.0).view
    assert len(view.spans(REVISION, BLOCKS)) == 4


def test_a_server_next_door_counts_for_those_in_its_house_alone() -> None:
    view = swarm_of(0, ["none"])
    (record,) = view.records()
    near = replace(record, lan=("/ip4/192.168.1.11/tcp/1",), seen="203.0.113.7", seq=2)
    view = merge(view, [Arrival(near, b"")], 1.0).view
    assert view.spans(REVISION, BLOCKS) == ()
    for seen, counts in (("203.0.113.7", 1), ("203.0.113.8", 0)):
        inside = replace(view, seen=frozenset({seen}))
        assert len(inside.spans(REVISION, BLOCKS)) == counts
        assert len(inside.dialled_at(near)) == counts


@pytest.mark.parametrize("seed", range(10))
def test_prompts_go_round_relays_where_public_servers_hold_every_block(seed: int) -> None:
    """Half of the servers are behind relays and nearer; 1,024 positions of 8 KiB take 1.3 s there."""
    kinds: list[Reach] = [("relayed", "public")[number % 2] for number in range(SERVERS)]
    view = swarm_of(seed, kinds)
    spans = view.spans(REVISION, BLOCKS)
    public = [span for span in spans if span.reach == "public"]
    rtts = {span.peer: 0.002 if span.reach == "relayed" else 0.2 for span in spans}
    of_use = min(coverage(public, BLOCKS)) >= 1
    few = Considered(position_bytes=8192)
    ways = {}
    for positions in (1, 1024):
        carrying = few.carrying(view, spans, positions)
        assert carrying.keys() == {span.peer for span in spans if span.reach == "relayed"}
        chain = cheapest_chain(spans, BLOCKS, known=CostInputs(rtts, positions=positions, carrying=carrying))
        ways[positions] = {view.entries[hop.peer].record.reach for hop in chain.hops}
    if of_use:
        assert ways[1024] == {"public"}
    assert "relayed" in ways[1]
