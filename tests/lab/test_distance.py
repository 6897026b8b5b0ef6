"""TCP between real nodes, near and far: which congestion control their connections have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.reach.hosts import Peer
from node.network.transport.congestion import has_bbr
from tests.netlab.lab import Lab
from tests.netlab.topology import Line

pytestmark = pytest.mark.process

USUAL = "/proc/sys/net/ipv4/tcp_congestion_control"


def controls(lab: Lab, host: str, other: str) -> set[str]:
    """The congestion controls of a host's connections with another one."""
    lines = lab.run(host, ["ss", "-tinOH", "state", "established"]).splitlines()
    between = [line.split() for line in lines if lab.hosts[other].ip4 in line]
    return {word for words in between for word in words if word in ("bbr", "reno", "cubic")}


def test_a_distant_peer_gets_bbr_at_both_ends_and_a_near_one_what_the_system_gives(
    lab: Lab, figure: Callable[[str], None]
) -> None:
    if not has_bbr():
        pytest.skip("this machine has no BBR")
    lab.public("p1")
    lab.public("far", Line(20))
    lab.public("near")
    for host in ("p1", "far", "near"):
        lab.run(host, ["sh", "-c", f"echo reno > {USUAL}"])
    node = Peer(lab, "p1")
    others = [Peer(lab, name, [node.address]) for name in ("far", "near")]
    found = {name: (controls(lab, "p1", name), controls(lab, name, "p1")) for name in ("far", "near")}
    figure(f"congestion control at both ends: {found}")
    assert len(others) == 2
    assert found["far"] == ({"bbr"}, {"bbr"})
    assert found["near"] == ({"reno"}, {"reno"})
