"""The lab does what its homes promise: seen by plain TCP, without Raceme."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.netlab.lab import Lab
from tests.netlab.namespaces import LabError
from tests.netlab.rules import KINDS, has_nat
from tests.netlab.topology import Line

pytestmark = pytest.mark.process

PORT = 4000
TCP = [sys.executable, "-m", "tests.netlab.tcp"]


def listening(lab: Lab, host: str) -> subprocess.Popen[str]:
    process = lab.popen(host, [*TCP, "listen", str(PORT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def dial(lab: Lab, host: str, to: str, source_port: int = 0) -> str:
    return dials(lab, host, [to], source_port)[0]


def dials(lab: Lab, host: str, to: list[str], source_port: int = 0) -> list[str]:
    """The outcome of each dial; all are dialled at once."""
    return lab.run(host, [*TCP, "dial", str(PORT), str(source_port), *to]).splitlines()


def test_a_home_is_not_dialled_from_outside_and_dials_what_is_public(lab: Lab) -> None:
    public = lab.public("p1")
    (host,), (other,) = lab.home("a", "cone"), lab.home("b", "cone")
    assert host.ip4 == other.ip4, "all homes have the same private addresses"
    there, inside, outside = (listening(lab, name) for name in ("b1", "a1", "p1"))
    router = lab.hosts["a"].ip4
    assert dials(lab, "p1", [router, host.ip4, host.ip6]) == ["timed out"] * 3
    assert dials(lab, "b1", [router, host.ip4]) == ["timed out", "connected"]
    assert there.stdout.readline().split()[0] == other.ip4, "b1 dialled itself, and not the other home's host"
    assert dial(lab, "a1", public.ip4, 5000) == "connected"
    assert outside.stdout.readline().split() == [router, "5000"]
    assert dial(lab, "a1", public.ip6) == "connected"
    assert outside.stdout.readline().split()[0] == host.ip6
    assert inside.poll() is None


def test_each_kind_of_home_refuses_and_maps_in_its_way(lab: Lab) -> None:
    public = lab.public("p1")
    outside, targets = listening(lab, "p1"), {}
    for kind in KINDS:
        (host,) = lab.home(kind, kind)
        listening(lab, host.name)
        targets[kind] = lab.hosts[kind].ip4 if has_nat(kind) else host.ip4
    found = dials(lab, "p1", list(targets.values()))
    assert dict(zip(KINDS, found, strict=True)) == {
        "cone": "timed out",
        "rejecting": "refused",
        "symmetric": "timed out",
        "firewall": "timed out",
        "open": "connected",
    }
    for kind, target in targets.items():
        kept = set()
        for port in (5001, 5002, 5003):
            assert dial(lab, f"{kind}1", public.ip4, port) == "connected"
            address, seen = outside.stdout.readline().split()
            assert address == target
            kept.add(int(seen) == port)
        assert kept == {True} if kind != "symmetric" else False in kept


def test_a_forwarded_port_leads_in_until_the_router_starts_again(lab: Lab) -> None:
    lab.public("p1")
    lab.home("a", "cone", hosts=2)
    inside = listening(lab, "a2")
    lab.forward("a", PORT, "a2")
    assert dial(lab, "p1", lab.hosts["a"].ip4) == "connected"
    assert inside.stdout.readline().split()[0] == lab.hosts["p1"].ip4
    lab.forget("a")
    assert dial(lab, "p1", lab.hosts["a"].ip4) == "timed out"


@pytest.mark.usefixtures("lines")
def test_a_cut_cable_is_silent_and_a_mended_one_carries_again(lab: Lab) -> None:
    lab.public("p1")
    lab.public("p2", Line(1))
    listening(lab, "p2")
    target = lab.hosts["p2"]
    both = [target.ip4, target.ip6]
    assert dials(lab, "p1", both) == ["connected"] * 2
    lab.cut("p2")
    assert "connected" not in dials(lab, "p1", both)
    lab.mend("p2")
    assert dials(lab, "p1", both) == ["connected"] * 2


def test_a_host_with_another_address_is_found_there_alone(lab: Lab) -> None:
    lab.home("a", "cone", hosts=2)
    listening(lab, "a1")
    lab.readdress("a1", "192.168.1.77")
    old, new = dials(lab, "a2", ["192.168.1.11", "192.168.1.77"])
    assert old != "connected"
    assert new == "connected"
    assert lab.hosts["a1"].ip4 == "192.168.1.77"


@pytest.mark.usefixtures("lines")
def test_a_line_delays_every_packet_by_its_time(lab: Lab, figure: Callable[[str], None]) -> None:
    near, far = lab.public("p1"), lab.public("p2", Line(40))
    code = (
        "import json, socket, sys, time\n"
        "found = []\n"
        "for _ in range(5):\n"
        "    began = time.perf_counter()\n"
        "    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()\n"
        "    found.append(time.perf_counter() - began)\n"
        "print(json.dumps(found))"
    )
    listening(lab, "p2")
    found = json.loads(lab.run("p1", [sys.executable, "-c", code, far.ip4, str(PORT)]))
    figure(f"a line of 40 ms each way: {statistics.median(found) * 1e3:.1f} ms there and back")
    assert min(found) >= 0.079, "no packet is early; how late they are is the machine's load"
    assert near.ip4 != far.ip4


def test_a_command_that_fails_says_where_and_what(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"internet: ls /nowhere: .*No such file"):
        lab.run("internet", ["ls", "/nowhere"])


def test_everything_ends_with_the_block() -> None:
    with Lab() as lab:
        lab.public("p1")
        with closing(lab.popen("p1", ["sleep", "100"], stdout=subprocess.PIPE).stdout) as pipe:
            process = lab.popen("p1", ["sleep", "100"])
            assert process.poll() is None
            assert pipe.readable()
    assert process.poll() is not None
