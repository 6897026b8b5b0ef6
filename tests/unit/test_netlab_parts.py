"""The pure parts of the lab: its plan, its rules, and the time of frames on a line."""

from __future__ import annotations

import ipaddress
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.netlab.line import Direction
from tests.netlab.namespaces import entered
from tests.netlab.rules import KINDS, Kind, forwarding, has_nat, rules
from tests.netlab.topology import INTERNET, PRIVATE, Cable, Ip, Line, Namespace, Rules, Step, Topology


def plan() -> Topology:
    topology = Topology()
    topology.internet()
    return topology


def words_of(steps: list[Step], host: str) -> list[str]:
    return [step.words for step in steps if isinstance(step, Ip) and step.host == host]


def test_hosts_have_addresses_of_their_own_and_every_second_one_another_16() -> None:
    topology = plan()
    for number in range(1, 6):
        topology.public(f"p{number}")
    publics = [host for name, host in topology.hosts.items() if name != INTERNET]
    assert [host.ip4 for host in publics][:2] == ["198.19.1.11", "198.18.2.11"]
    assert len({ipaddress.ip_network(f"{host.ip4}/24", strict=False) for host in publics}) == 5
    assert len({ipaddress.ip_network(f"{host.ip4}/16", strict=False) for host in publics}) == 2
    assert len({ipaddress.ip_network(f"{host.ip6}/48", strict=False) for host in publics}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_homes_behind_nat_have_the_same_private_network_and_others_public_ones(kind: Kind) -> None:
    topology = plan()
    for name in ("a", "b"):
        topology.home(name, kind, 2)
    first, second = topology.hosts["a1"], topology.hosts["b1"]
    private = any(ipaddress.ip_address(first.ip4) in ipaddress.ip_network(each) for each in PRIVATE)
    assert private is (first.ip4 == second.ip4) is has_nat(kind)
    assert topology.hosts["a"].ip4 != topology.hosts["b"].ip4
    assert first.ip6 != second.ip6
    assert topology.homes["b"].hosts == ["b1", "b2"]
    assert (first.home, topology.hosts["a"].home) == ("a", "")


def test_a_host_is_made_before_its_cable_and_its_cable_before_its_addresses() -> None:
    steps = plan().home("a", "cone", 1, Line(5, 10))
    kinds = [type(step) for step in steps if getattr(step, "host", "") == "a1"]
    assert kinds[:3] == [Namespace, Cable, Ip]
    (wan,) = [step for step in steps if isinstance(step, Cable) and step.host == "a"]
    (lan,) = [step for step in steps if isinstance(step, Cable) and step.host == "a1"]
    assert (wan.device, wan.line, wan.bridge_host) == ("wan", Line(5, 10), INTERNET)
    assert (lan.device, lan.line, lan.bridge_host) == ("eth0", None, "a")
    assert steps[-1] == Rules("a", rules("cone")), "the filter comes last, when the home's hosts are there"


def test_private_addresses_vanish_on_the_internet() -> None:
    lines = words_of(Topology().internet(), INTERNET)
    assert {f"route add blackhole {network}" for network in PRIVATE} <= set(lines)


def test_a_home_without_ipv6_has_none() -> None:
    topology = plan()
    steps = topology.home("a", "firewall", 1, ipv6=False)
    assert (topology.hosts["a"].ip6, topology.hosts["a1"].ip6) == ("", "")
    assert not any(":" in step.words for step in steps if isinstance(step, Ip))


def test_another_address_replaces_the_old_one_and_its_route() -> None:
    topology = plan()
    topology.home("a", "cone", 1)
    steps = topology.readdress("a1", "192.168.1.77")
    assert words_of(steps, "a1") == [
        "addr del 192.168.1.11/24 dev eth0",
        "addr add 192.168.1.77/24 dev eth0",
        "route replace default via 192.168.1.1",
    ]
    assert topology.hosts["a1"].ip4 == "192.168.1.77"
    assert topology.forward("a", 31330, "a1") == [Rules("a", forwarding(31330, "192.168.1.77"))]


def test_a_cable_is_cut_at_its_far_end() -> None:
    topology = plan()
    topology.public("p1")
    topology.home("a", "cone", 1)
    assert topology.cut("p1") == [Ip(INTERNET, "link set p-p1 down")]
    assert topology.mend("a1") == [Ip("a", "link set p-a1 up")]


@pytest.mark.parametrize(
    ("name", "kind", "hosts", "said"),
    [
        ("p1", "cone", 1, "'p1' is taken"),
        ("a" * 14, "cone", 1, "14 letters, 1 to 13 are allowed"),
        ("a" * 13, "cone", 1, "14 letters, 1 to 13 are allowed"),
        ("", "cone", 1, "0 letters"),
        ("a", "conic", 1, "kind 'conic', known are cone, rejecting, symmetric, open, firewall"),
        ("a", "cone", 0, "0 hosts in the home 'a', at least 1 is needed"),
    ],
)
def test_what_cannot_be_planned_is_said(name: str, kind: Kind, hosts: int, said: str) -> None:
    topology = plan()
    topology.public("p1")
    with pytest.raises(ValueError, match=said):
        topology.home(name, kind, hosts)


def test_the_kinds_of_homes_differ_in_their_rules() -> None:
    assert get_args(Kind) == KINDS
    assert len({rules(kind) for kind in KINDS}) == len(KINDS)
    assert rules("open") == ""
    assert "fully-random" in rules("symmetric")
    assert "reject with tcp reset" in rules("rejecting")
    assert "masquerade" not in rules("firewall")
    for kind in KINDS[:3]:
        assert rules(kind).count("ct state established,related accept") == 2


def test_a_router_that_starts_again_first_deletes_what_it_has() -> None:
    topology = plan()
    topology.home("a", "cone", 1)
    topology.home("b", "open", 1)
    (step,) = topology.forget("a")
    assert isinstance(step, Rules)
    assert step.text == "delete table ip lab\ndelete table inet lab\n" + rules("cone")
    assert topology.forget("b") == []


def test_the_words_before_a_command_are_read_back() -> None:
    prefix = ["nsenter", "--target", "7", "--mount", "--net", "--wd", "--"]
    assert entered([*prefix, "python", "--", "x"]) == (7, ["mnt", "net"], len(prefix))
    user = [*prefix[:3], "--user", "--preserve-credentials", *prefix[3:]]
    assert entered([*user, "python"]) == (7, ["user", "mnt", "net"], len(user))
    assert entered(["python", "-m", "node"]) is None


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 70_000)), min_size=1),
    st.floats(0, 300),
    st.floats(0.1, 1000),
)
def test_frames_arrive_in_order_never_faster_than_the_rate_and_never_before_the_delay(
    frames: list[tuple[float, int]], milliseconds: float, mbit: float
) -> None:
    direction, now, arrivals, sent = Direction(Line(milliseconds, mbit)), 0.0, [], []
    for wait, size in frames:
        now += wait
        arrivals.append(direction.arrival(now, size))
        sent.append(now)
    assert arrivals == sorted(arrivals)
    seconds = [size * 8 / (mbit * 1e6) for _, size in frames]
    assert arrivals[-1] >= sent[0] + sum(seconds) + milliseconds / 1e3 - 1e-9
    for at, took, arrival in zip(sent, seconds, arrivals, strict=True):
        assert arrival >= at + took + milliseconds / 1e3 - 1e-9


def test_a_frame_that_would_wait_longer_than_the_queue_is_dropped() -> None:
    direction = Direction(Line(milliseconds=10, mbit=8, queue_ms=5))  # a byte a microsecond
    assert direction.arrival(0.0, 5_000) == pytest.approx(0.015)
    assert direction.arrival(0.0, 1_000) == pytest.approx(0.016), "it waits 5 ms, as long as it may"
    assert direction.arrival(0.0, 1) is None
    assert direction.arrival(0.002, 1_000) == pytest.approx(0.017), "what was dropped takes no time"


def test_an_unbounded_line_only_delays() -> None:
    direction = Direction(Line(20))
    assert [direction.arrival(1.0, size) for size in (1, 10**9)] == pytest.approx([1.02, 1.02])
    assert Line(20).mbit == math.inf
