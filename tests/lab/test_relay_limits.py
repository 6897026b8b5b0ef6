"""A relay by the wire alone: reservations are of the connection's peer, and everything has a bound."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks.reach.hosts import Answerer, Peer
from tests.lab.nodes import until
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

CIRCUITS_TO_A_TARGET = 16
CIRCUITS_FROM_A_SOURCE = 8
GONE_SECONDS = 10.0  # until a relay notices that a source has ended, at most
FLOOD_MIB = 64
MORE_MIB = 8.0  # of the relay's memory, for one circuit


class Hopping(Answerer):
    """A process of `tests.lab.hopping`.  peer: its id."""

    def __init__(self, lab: Lab, host: str, relay: Peer) -> None:
        super().__init__(lab, host, "tests.lab.hopping", [relay.address])
        self.peer: str = self.hear()["peer"]

    def reserve(self, claimed: str | None = None) -> str:
        """The relay's answer; claimed: the peer that the message names."""
        status: str = self.ask({"reserve": claimed})["status"]
        return status

    def connect(self, peer: str) -> str:
        """The relay's answer."""
        status: str = self.ask({"connect": peer})["status"]
        return status


@pytest.fixture(scope="module")
def relay(shared_lab: Lab) -> Peer:
    for name in ("relay", "thief", "victim", "q0", "q1", "q2"):
        shared_lab.public(name)
    return Peer(shared_lab, "relay")


def test_a_reservation_is_the_connected_peer_s_whatever_the_message_names(
    shared_lab: Lab, relay: Peer
) -> None:
    thief, victim, dialler = (Hopping(shared_lab, name, relay) for name in ("thief", "victim", "q0"))
    assert thief.reserve(victim.peer) == "OK"
    assert dialler.connect(victim.peer) == "NO_RESERVATION"
    assert dialler.connect(thief.peer) == "OK", "it has reserved for itself"
    for each in (thief, victim, dialler):
        each.kill()


def test_a_seventeenth_circuit_to_one_target_and_a_ninth_from_one_source_are_refused(
    shared_lab: Lab, relay: Peer
) -> None:
    target, *sources = (Hopping(shared_lab, name, relay) for name in ("victim", "q0", "q1", "q2"))
    assert target.reserve() == "OK"
    for source in sources[:2]:
        for _ in range(CIRCUITS_FROM_A_SOURCE):
            assert source.connect(target.peer) == "OK"
    assert sources[0].connect(target.peer) == "RESOURCE_LIMIT_EXCEEDED"
    assert sources[2].connect(target.peer) == "RESOURCE_LIMIT_EXCEEDED", "a seventeenth"
    sources[1].kill()
    until(lambda: sources[2].connect(target.peer) == "OK", GONE_SECONDS)
    for each in (target, *sources):
        each.kill()


def test_a_target_that_reads_nothing_does_not_grow_the_relay(
    shared_lab: Lab, relay: Peer, figure: Callable[[str], None]
) -> None:
    """Its kernel's buffers fill, then the relay's, then the source waits."""
    target, source = (Hopping(shared_lab, name, relay) for name in ("victim", "q0"))
    assert target.reserve() == "OK"
    assert source.connect(target.peer) == "OK"
    before, began = relay.rss_mib(), time.monotonic()
    sent = source.ask({"flood": FLOOD_MIB})["sent"] / 2**20
    more = relay.rss_mib() - before
    figure(
        f"a target that reads nothing: {sent:.1f} of {FLOOD_MIB} MiB were taken in "
        f"{time.monotonic() - began:.1f} s, the relay grew by {more:.1f} MiB"
    )
    assert sent < FLOOD_MIB
    assert more < MORE_MIB
