"""Announced addresses of real nodes, on machines with several networks and with networks that change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.reach.hosts import Peer
from tests.lab.nodes import expected, lab_swarm, prompt
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

CONNECT_SECONDS = 1.0
RECORD_SECONDS = 40.0  # interfaces are read every 30 s
LOOK_SECONDS = 0.1
TOKENS = 24


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


def test_a_server_that_changes_its_network_is_found_again_and_its_session_goes_on(
    lab: Lab, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    """A laptop gets another address of its LAN: its connections die, and its old address is nobody's."""
    lab.public("p1")
    lab.home("a", "cone", hosts=3)
    with lab_swarm(lab, tiny_llama) as swarm:
        swarm.bootstrap("a3")
        server = swarm.serve("a1", 0, 6).facts["peer_id"]
        watcher = Peer(lab, "a3", swarm.peers, ["--listen", "/ip4/0.0.0.0/tcp/31331"])
        client, ids = swarm.client("a2"), prompt()
        client.begin(ids, TOKENS)
        tokens = client.take(TOKENS // 2)
        lab.readdress("a1", "192.168.1.77")
        began = time.monotonic()
        tokens += client.take(TOKENS // 2)
        session_seconds = time.monotonic() - began
        new = "/ip4/192.168.1.77/tcp/31330"
        while new not in watcher.do("records")["peers"].get(server, {"addresses": []})["addresses"]:
            assert time.monotonic() - began < RECORD_SECONDS, "the record is old"
            time.sleep(LOOK_SECONDS)
        record_seconds = time.monotonic() - began
        figure(
            f"another address: the session's next token after {session_seconds:.1f} s, "
            f"the record after {record_seconds:.1f} s at most"
        )
        assert tokens == expected(tiny_llama, ids, TOKENS)
        assert session_seconds < RECORD_SECONDS
