"""The machines of a simulated swarm, and what is common to honest ones and attackers."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Literal

import trio

from node.network.directory.kademlia.contact import Contact
from node.network.transport.identity import Identity, identity_of
from routing.names import PeerId
from routing.view.records import Record
from tensor_codec.limits import Limits
from tests.fakes_network import FakeHost, FakeNetwork

Means = Literal["lie", "slow", "silent", "crowd"]

DELAY_SECONDS = 0.02  # of each way
CROWDED_RECORDS = 200  # places of a view in the case `crowd`, in proportion to a small swarm
SERVER = Record(
    role="serve",
    model="m",
    blocks=30,
    start=0,
    stop=10,
    dtype="float32",
    seconds_per_block=0.001,
    prefill_seconds_per_token=0.0001,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of attack.

    means: what attackers do when they are asked; None for no attackers.
    prefixes: public networks (/24) that they have.  ids: their peers.  honest: servers.
    """

    means: Means | None
    prefixes: int
    ids: int
    honest: int

    @property
    def name(self) -> str:
        """For tables."""
        return "none" if self.means is None else f"{self.means}-{self.prefixes}"


class Network(FakeNetwork):
    """Also knows pairs that cannot reach each other, for a while."""

    def __init__(self) -> None:
        super().__init__(DELAY_SECONDS)
        self.cut: set[frozenset[PeerId]] = set()

    def reachable(self, one: PeerId, other: PeerId) -> bool:
        """Whether a dial arrives."""
        return super().reachable(one, other) and frozenset((one, other)) not in self.cut


@dataclass(slots=True)
class Scene:
    """What all parts of one simulation share.  seed: of everything that is left to chance."""

    case: Case
    seed: int
    nursery: trio.Nursery
    network: Network = field(default_factory=Network)
    honest: list[Host] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.case.name} {self.seed}")

    @property
    def revision(self) -> str:
        """Of the model that is served; it makes the key in the Kademlia table."""
        return f"r{self.seed}"

    @property
    def limits(self) -> Limits:
        """Of every node."""
        return Limits(max_records=CROWDED_RECORDS) if self.case.means == "crowd" else Limits()


class Host(FakeHost):
    """A machine with a public IPv4 address."""

    def __init__(self, scene: Scene, identity: Identity, address: str) -> None:
        super().__init__(scene.network, 0, scene.nursery, scene.limits, identity)
        self.addresses = self.addresses_of_the_machine = (f"/ip4/{address}/tcp/4001",)
        self.prefix = f"{address}/32"
        self.contact = Contact(self.peer_id, self.addresses)


def identity_named(name: str) -> Identity:
    """The identity that belongs to a name, the same in every run."""
    return identity_of(hashlib.sha256(name.encode()).digest())


def numbered_address(first: int, number: int, host: int = 1) -> str:
    """An address in the public network of that number."""
    return f"{first + number // 62_500}.{number // 250 % 250}.{number % 250}.{host}"
