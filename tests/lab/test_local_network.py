"""Nodes of one LAN find each other, and a node that changes its network is found again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.reach.hosts import Peer, bytes_through
from tests.lab.nodes import Client, expected, lab_swarm, prompt, until
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

FOUND_SECONDS = 4.0
RECORD_SECONDS = 40.0
TOKENS = 24
SECOND_PORT = "/ip4/0.0.0.0/tcp/31331"


@dataclass(slots=True)
class Moving:
    """A server that has just got another address, and a client whose session with it goes on by itself.

    tokens: of the session before the change.  at: the time of the change.
    """

    client: Client
    watcher: Peer
    tokens: list[int]
    at: float


@pytest.fixture(scope="module")
def moving(shared_lab: Lab, tiny_llama: Path) -> Iterator[Moving]:
    """A laptop gets another address of its LAN: its connections die, and its old address is nobody's."""
    shared_lab.home("b", "cone", hosts=3)
    with lab_swarm(shared_lab, tiny_llama) as swarm:
        swarm.bootstrap("b3")
        server = swarm.serve("b1", 0, 6).facts["peer_id"]
        watcher = Peer(shared_lab, "b3", swarm.peers, ["--listen", SECOND_PORT])
        client = swarm.client("b2")
        client.begin(prompt(), TOKENS)
        tokens = client.take(TOKENS // 2)
        shared_lab.readdress("b1", "192.168.1.77")
        at = time.time()
        client.tell({"take": TOKENS // 2})
        order = {"do": "until_address", "peer": server, "address": "/ip4/192.168.1.77/tcp/31330"}
        watcher.tell({**order, "seconds": RECORD_SECONDS})
        yield Moving(client, watcher, tokens, at)


@pytest.mark.usefixtures("moving")  # which goes on meanwhile
def test_two_laptops_find_each_other_without_being_told(
    shared_lab: Lab, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    shared_lab.home("a", "cone", hosts=2)
    with lab_swarm(shared_lab, tiny_llama) as swarm:
        first = swarm.start("a1", 0, 3, "--lan", peers=[])
        second = swarm.start("a2", 3, 6, "--lan", peers=[])
        for node in (first, second):
            node.wait_online()
        watcher = Peer(shared_lab, "a1", [first.address], ["--listen", SECOND_PORT])
        peer = second.facts["peer_id"]
        seconds = until(lambda: peer in watcher.do("records")["peers"], FOUND_SECONDS)
        figure(f"two laptops on one LAN: found at most {seconds:.2f} s after both were online")
        before = bytes_through(shared_lab, "a")
        client, ids = swarm.client("a2", peers=[second.address]), prompt()
        assert client.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
        assert set(client.ways().values()) == {"direct"}
        assert bytes_through(shared_lab, "a") == before, "nothing goes by the Internet"


def test_a_server_that_changes_its_network_is_found_again_and_its_session_goes_on(
    moving: Moving, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    found = moving.watcher.hear()
    assert "at" in found, found
    tokens = moving.tokens + moving.client.hear()
    figure(
        f"another address of a server: in its record {found['at'] - moving.at:.1f} s later, "
        f"its session goes on {time.time() - moving.at:.1f} s later at most"
    )
    assert tokens == expected(tiny_llama, prompt(), TOKENS)
