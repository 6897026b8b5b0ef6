"""A small Internet with several swarms, whose members are at home: for the tests of one module.

Everything starts at once, for a node at home learns its reach only after a dial to it has timed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.processes import NodeProcess
from benchmarks.reach.hosts import Peer
from tests.lab.nodes import Client, LabSwarm, lab_swarm, run_on
from tests.netlab.lab import Lab
from tests.netlab.topology import Line

KNOWN_SECONDS = 20.0
FAR = Line(20)


@dataclass(slots=True)
class Swarm:
    """relays: peers on the Internet, all that there are.  server: of all blocks, at home."""

    lab: Lab
    model: Path
    relays: list[Peer]
    server: NodeProcess

    @property
    def addresses(self) -> list[str]:
        """For --peers."""
        return [relay.address for relay in self.relays]

    def ready(self) -> str:
        """Wait until the server is online and known to be relayed by every relay; its id."""
        if not self.server.facts:
            self.server.wait_online()
        peer: str = self.server.facts["peer_id"]
        for relay in self.relays:
            relay.do("until_relays", peer=peer, count=len(self.relays), seconds=KNOWN_SECONDS)
        return peer

    def client(self, host: str) -> Client:
        """A client that has joined."""
        return Client(self.lab, host, self.model, self.addresses)

    def relayed_bytes(self) -> int:
        """What the relays have carried so far."""
        return sum(relay.do("relayed")["bytes"] for relay in self.relays)


@dataclass(slots=True)
class World:
    """cones, symmetric, firewall6: swarms whose server is at such a home.

    private: the relay and two members of a private swarm, at symmetric homes.
    forwarded: a peer at a home whose router forwards its port.
    """

    lab: Lab
    cones: Swarm
    symmetric: Swarm
    firewall6: Swarm
    private: tuple[Peer, Peer, Peer]
    forwarded: Peer


@contextmanager
def open_world(lab: Lab, model: Path, folder: Path) -> Iterator[World]:
    """Public hosts p1 and p2; homes a and b (cone), c (firewall), s and t (symmetric), f (forwarded)."""
    for name in ("p1", "p2"):
        lab.public(name)
    lab.home("a", "cone", line=FAR, ipv6=False)
    lab.home("b", "cone", line=FAR, ipv6=False)
    lab.home("c", "firewall", line=FAR)
    for name in ("s", "t"):
        lab.home(name, "symmetric", ipv6=False)
    lab.home("f", "cone", ipv6=False)
    lab.forward("f", 31330, "f1")
    key = folder / "swarm.key"
    run_on(lab, "p1", "node", "new-swarm-key", str(key))
    with lab_swarm(lab, model) as nodes:
        cones = _swarm(nodes, "a1", ("p1",), 31330)
        symmetric = _swarm(nodes, "s1", ("p1", "p2"), 31331)
        firewall6 = _swarm(nodes, "c1", ("p1",), 31332, "/ip6/::/tcp")
        member = ["--swarm-key", str(key), "--listen", "/ip4/0.0.0.0/tcp/31333"]
        relay = Peer(lab, "p1", flags=member)
        home, dialler = (Peer(lab, host, [relay.address], member) for host in ("s1", "t1"))
        forwarded = Peer(lab, "f1", cones.addresses)
        yield World(lab, cones, symmetric, firewall6, (relay, home, dialler), forwarded)


def _swarm(
    nodes: LabSwarm, home: str, relays: Sequence[str], port: int, listen: str = "/ip4/0.0.0.0/tcp"
) -> Swarm:
    first: list[str] = []
    peers = []
    for host in relays:
        peers.append(Peer(nodes.lab, host, first, ["--listen", f"{listen}/{port}"]))
        first = first or [peers[0].address]
    addresses = [peer.address for peer in peers]
    server = nodes.start(home, 0, 6, listen=[f"{listen}/{port}"], peers=addresses)
    return Swarm(nodes.lab, nodes.model, peers, server)
