"""A server that is announced and out of reach costs the others' clients next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from benchmarks.reach.hosts import Answerer
from tests.lab.nodes import lab_swarm
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

CLIENTS = 5
MORE_SECONDS = 0.05
PORTS = {
    2: "/ip4/0.0.0.0/tcp/31330",
    3: "/ip4/0.0.0.0/tcp/31331",
}  # of two swarms, by their number of servers


def test_a_server_that_answers_nothing_delays_no_first_token_of_others(
    lab: Lab, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    """Two swarms on the same hosts; one has a further server, whose cable is pulled once it is online.

    Each first token is that of a new client, in both swarms in turn: a busy machine slows both.
    """
    for name in ("p1", "p2", "p3", "p4", "p5"):
        lab.public(name)
    client = Answerer(lab, "p5", "benchmarks.startup.client")
    seconds: dict[int, list[float]] = {servers: [] for servers in PORTS}
    with lab_swarm(lab, tiny_llama) as swarm:
        peers = {}
        for servers, port in PORTS.items():
            peers[servers] = [swarm.bootstrap("p1", listen=[port], peers=[]).address]
            swarm.serve("p2", 0, 3, listen=[port], peers=peers[servers])
            swarm.serve("p3", 3, 6, listen=[port], peers=peers[servers])
        swarm.serve("p4", 0, 6, peers=peers[3])
        lab.cut("p4")
        for number in range(CLIENTS + 1):
            for servers in PORTS:
                answer = client.ask([str(tiny_llama), peers[servers], 1])
                assert answer["servers"] == servers, "the record of each server is known"
                seconds[servers] += [answer["first_token_s"]] * (number > 0)  # the first one only warms up
    without, beside = median(seconds[2]), median(seconds[3])
    figure(
        f"first token beside a black-holed server: {(beside - without) * 1e3:+.0f} ms "
        f"on {without * 1e3:.0f} ms"
    )
    assert beside < without + MORE_SECONDS
