"""A small Internet with several swarms, whose members are at home: for the tests of one module.

Everything starts at once, for a node at home learns its reach only after a dial to it has timed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.processes import NodeProcess
from benchmarks.reach.hosts import Peer
from tests.lab.nodes import Client, LabSwarm, lab_swarm, run_on
from tests.netlab.lab import Lab, cannot
from tests.netlab.topology import Line

KNOWN_SECONDS = 20.0
FAR = Line(20)  # where lines can be made
ANY4, ANY6 = "/ip4/0.0.0.0/tcp", "/ip6/::/tcp"


@dataclass(slots=True)
class Swarm:
    """relays: peers on the Internet, all that relay.  servers: by their hosts."""

    lab: Lab
    model: Path
    relays: list[Peer]
    servers: Mapping[str, NodeProcess]

    @property
    def addresses(self) -> list[str]:
        """For --peers."""
        return [relay.address for relay in self.relays]

    def ready(self) -> dict[str, str]:
        """Wait until all servers are online, and every relay relays to those at home; all ids, by host."""
        for server in self.servers.values():
            if not server.facts:
                server.wait_online()
        peers: dict[str, str] = {host: server.facts["peer_id"] for host, server in self.servers.items()}
        for relay in self.relays:
            for host, peer in peers.items():
                if self.lab.hosts[host].home:
                    count = len(self.relays)
                    relay.do("until_relays", peer=peer, count=count, seconds=KNOWN_SECONDS)
        return peers

    def client(self, host: str) -> Client:
        """A client that has joined."""
        return Client(self.lab, host, self.model, self.addresses)

    def relayed_bytes(self) -> list[int]:
        """What each relay has carried so far."""
        return [relay.do("relayed")["bytes"] for relay in self.relays]


@dataclass(slots=True)
class World:
    """cone, mixed, firewall6: swarms with servers at such homes; of mixed, one is public, and two relay.

    private: the relay and two members of a private swarm, at symmetric homes.
    forwarded: a peer at a home whose router forwards its port.
    unreached: a server that must be reached, at a home in a swarm where nobody relays.
    """

    lab: Lab
    cone: Swarm
    mixed: Swarm
    firewall6: Swarm
    private: tuple[Peer, Peer, Peer]
    forwarded: Peer
    unreached: NodeProcess


@contextmanager
def open_world(lab: Lab, model: Path, folder: Path) -> Iterator[World]:
    """Public hosts p1 and p2; homes a and b (cone), c (firewall), s and t (symmetric), f (forwarded)."""
    for name in ("p1", "p2"):
        lab.public(name)
    far = FAR if cannot() is None else None
    lab.home("a", "cone", line=far, ipv6=False)
    lab.home("b", "cone", line=far, ipv6=False)
    lab.home("c", "firewall", line=far)
    for name in ("s", "t"):
        lab.home(name, "symmetric", ipv6=False)
    lab.home("f", "cone", ipv6=False)
    lab.forward("f", 31330, "f1")
    key = folder / "swarm.key"
    run_on(lab, "p1", "node", "new-swarm-key", str(key))
    with lab_swarm(lab, model) as nodes:
        cone = _swarm(nodes, ("p1",), {"a1": (0, 6)}, f"{ANY4}/31330")
        thirds = {"a1": (0, 2), "s1": (2, 4), "p2": (4, 6)}
        mixed = _swarm(nodes, ("p1", "p2"), thirds, f"{ANY4}/31331", f"{ANY4}/31332")
        firewall6 = _swarm(nodes, ("p1",), {"c1": (0, 6)}, f"{ANY6}/31333")
        member = ["--swarm-key", str(key), "--listen", f"{ANY4}/31334"]
        relay = Peer(lab, "p1", flags=member)
        home, dialler = (Peer(lab, host, [relay.address], member) for host in ("s1", "t1"))
        forwarded = Peer(lab, "f1", cone.addresses)
        useless = Peer(lab, "p1", flags=["--listen", f"{ANY4}/31335", "--no-relay"])
        unreached = nodes.start(
            "a1", 0, 6, "--require-reach", listen=[f"{ANY4}/31335"], peers=[useless.address]
        )
        yield World(lab, cone, mixed, firewall6, (relay, home, dialler), forwarded, unreached)


def _swarm(
    nodes: LabSwarm,
    relays: Sequence[str],
    servers: Mapping[str, tuple[int, int]],
    listen: str,
    server_listen: str | None = None,
) -> Swarm:
    """listen: of relays, and of servers where these have none of their own.  Public servers relay nothing."""
    first: list[str] = []
    peers = []
    for host in relays:
        peers.append(Peer(nodes.lab, host, first, ["--listen", listen]))
        first = first or [peers[0].address]
    addresses = [peer.address for peer in peers]
    started = {
        host: nodes.start(host, start, stop, "--no-relay", listen=[server_listen or listen], peers=addresses)
        for host, (start, stop) in servers.items()
    }
    return Swarm(nodes.lab, nodes.model, peers, started)
