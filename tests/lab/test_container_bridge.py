"""Announced addresses of real nodes, on machines with several networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.reach.hosts import Peer
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

CONNECT_SECONDS = 1.0


def test_a_bridge_of_containers_on_a_public_node_hides_it_from_nobody(
    lab: Lab, figure: Callable[[str], None]
) -> None:
    """Both where the node announces its real address alone, and where an older one announces the bridge too.

    A packet for the bridge's address vanishes between the machines.
    """
    lab.public("p1")
    lab.public("p2")
    lab.bridge("p1", "docker0", "172.17.0.1")
    node, other = Peer(lab, "p1"), Peer(lab, "p2")
    assert [address.split("/")[2] for address in node.addresses] == [lab.hosts["p1"].ip4]
    real = node.address.partition("/p2p/")[0]
    older = [
        real.replace(lab.hosts["p1"].ip4, "172.17.0.1"),
        real.replace(lab.hosts["p1"].ip4, "10.0.0.7"),
        real,
    ]
    found = other.do("connect", peer=node.peer, addresses=older, configured=True)
    figure(f"a public node with docker0: connected after {found['seconds'] * 1e3:.0f} ms")
    assert found["way"] == "direct"
    assert found["seconds"] < CONNECT_SECONDS
