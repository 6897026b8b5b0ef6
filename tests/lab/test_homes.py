"""Servers at home and clients elsewhere: the tokens are the whole model's, whatever way they take."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.reach.hosts import Peer
from tests.lab.nodes import Client, expected, prompt, until
from tests.lab.world import KNOWN_SECONDS, World, open_world
from tests.netlab.lab import Lab

pytestmark = pytest.mark.process

TOKENS = 16
LONG_PROMPT = 100
DIRECT_SECONDS = 2.0
PUNCHED_SECONDS = 5.0  # of all tries together
KEPT_BYTES = 4096  # of pings on a circuit that is not closed yet
MAPPER = shutil.which("miniupnpd", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
MAPPER_SETTINGS = """ext_ifname=wan
ext_ip=8.8.8.8
listening_ip=lan
enable_natpmp=yes
enable_upnp=yes
secure_mode=no
port=5000
uuid=00000000-0000-0000-0000-000000000001
"""
# the chains that miniupnpd fills, as its package makes them; the router lets in what they have forwarded
MAPPER_CHAINS = """table inet filter {
    chain forward { type filter hook forward priority filter; policy accept; jump miniupnpd; }
    chain prerouting { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
    chain postrouting { type nat hook postrouting priority srcnat; jump postrouting_miniupnpd; }
    chain miniupnpd { }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
}
insert rule inet lab forward ct status dnat accept
"""


@pytest.fixture(scope="module")
def world(shared_lab: Lab, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with open_world(shared_lab, tiny_llama, tmp_path_factory.mktemp("world")) as made:
        yield made


def served_directly(client: Client, server: str, model: Path) -> tuple[float, float]:
    """Seconds of a generation with the whole model's tokens, and then until the server is direct."""
    ids, began = prompt(), time.monotonic()
    assert client.generate(ids, TOKENS) == expected(model, ids, TOKENS)
    took = time.monotonic() - began
    return took, until(lambda: client.ways().get(server) == "direct", DIRECT_SECONDS)


def test_a_server_behind_nat_serves_a_public_client_directly(
    world: World, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    server, ids = world.cone.ready()["a1"], prompt()
    client = world.cone.client("p2")
    took, seconds = served_directly(client, server, tiny_llama)
    figure(
        f"a server at home, a public client: {TOKENS} tokens in {took:.2f} s, direct {seconds:.2f} s later"
    )
    assert client.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
    assert client.ways()[server] == "direct"


@pytest.mark.parametrize("home", ["b", "c"])
def test_two_homes_punch_and_the_relay_carries_no_more(
    world: World, home: str, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    server, ids = world.cone.ready()["a1"], prompt(tokens=LONG_PROMPT)
    client = world.cone.client(f"{home}1")
    began = time.monotonic()
    assert client.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
    took = time.monotonic() - began
    punched = until(lambda: client.ways().get(server) == "direct", PUNCHED_SECONDS)
    (carried,) = world.cone.relayed_bytes()
    assert client.generate(ids, TOKENS) == expected(tiny_llama, ids, TOKENS)
    more = world.cone.relayed_bytes()[0] - carried
    figure(
        f"cone and {world.lab.homes[home].kind}: {TOKENS} tokens in {took:.2f} s, direct "
        f"{punched:.2f} s later; of the next {TOKENS} the relay had {more} of {carried + more} bytes"
    )
    assert carried > 0
    assert more < KEPT_BYTES


def test_a_chain_over_two_homes_goes_through_a_relay_and_through_another_when_it_is_killed(
    world: World, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    """Two of six blocks are behind a cone NAT, two behind a symmetric one, two public; a fourth home asks."""
    swarm, ids = world.mixed, prompt()
    servers = swarm.ready()
    client = swarm.client("t1")
    client.begin(ids, TOKENS)
    before, began = swarm.relayed_bytes(), time.monotonic()
    tokens = client.take(TOKENS // 2)
    took = time.monotonic() - began
    carried = [now - then for now, then in zip(swarm.relayed_bytes(), before, strict=True)]
    ways = client.ways()
    assert {host: ways[peer] for host, peer in servers.items()} == {
        "a1": "circuit",
        "s1": "circuit",
        "p2": "direct",
    }
    used = swarm.relays[carried.index(max(carried))]
    used.kill()
    began = time.monotonic()
    tokens += client.take(TOKENS // 2)
    figure(
        f"two homes and a public server: {TOKENS // 2} tokens in {took:.2f} s, {max(carried) / 1024:.0f} KiB "
        f"through one relay; it was killed, and {TOKENS // 2} more took {time.monotonic() - began:.2f} s"
    )
    assert tokens == expected(tiny_llama, ids, TOKENS)
    assert max(carried) > 0


def test_a_forwarded_port_makes_a_home_public(world: World, figure: Callable[[str], None]) -> None:
    home, (watcher,) = world.forwarded, world.cone.relays
    known = watcher.do("until_reach", peer=home.peer, reach=["public"], seconds=KNOWN_SECONDS)
    figure(f"a forwarded port: public {known['at'] - home.started_at:.2f} s after its start, at most")
    record = watcher.do("records")["peers"][home.peer]
    outside = f"/ip4/{world.lab.hosts['f'].ip4}/tcp/31330"
    assert record["addresses"] == [outside], "no address that was not verified"
    dialler = Peer(world.lab, "p2", world.cone.addresses, ["--listen", "/ip4/0.0.0.0/tcp/31336"])
    assert dialler.do("connect", peer=home.peer)["way"] == "direct"


@pytest.mark.skipif(MAPPER is None, reason="no miniupnpd is installed (package miniupnpd-nftables)")
def test_a_router_that_maps_ports_makes_a_home_public(
    world: World, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """ext_ip: miniupnpd takes the lab's own addresses for no public ones, but forwards whatever comes."""
    lab, (watcher,) = world.lab, world.cone.relays
    lab.home("u", "cone", ipv6=False)
    rules, settings = tmp_path / "rules.nft", tmp_path / "miniupnpd.conf"
    rules.write_text(MAPPER_CHAINS)
    lab.run("u", ["nft", "-f", str(rules)])
    settings.write_text(MAPPER_SETTINGS)
    words = [str(MAPPER), "-d", "-f", str(settings), "-P", str(tmp_path / "pid")]
    with (tmp_path / "log").open("w") as log:
        lab.popen("u", words, stdout=log, stderr=log)
    until(lambda: "Listening for NAT-PMP" in (tmp_path / "log").read_text(), KNOWN_SECONDS)
    home = Peer(lab, "u1", world.cone.addresses, ["--port-mapping"])
    known = watcher.do("until_reach", peer=home.peer, reach=["public"], seconds=KNOWN_SECONDS)
    figure(f"a router that maps ports: public {known['at'] - home.started_at:.2f} s after the node's start")
    dialler = Peer(lab, "p2", world.cone.addresses, ["--listen", "/ip4/0.0.0.0/tcp/31338"])
    assert dialler.do("connect", peer=home.peer)["way"] == "direct"


def test_a_server_behind_a_firewall_of_ipv6_serves_a_public_client(
    world: World, tiny_llama: Path, figure: Callable[[str], None]
) -> None:
    server = world.firewall6.ready()["c1"]
    client = world.firewall6.client("p2")
    took, seconds = served_directly(client, server, tiny_llama)
    figure(
        f"a firewall of IPv6, a public client: {TOKENS} tokens in {took:.2f} s, direct {seconds:.2f} s later"
    )


def test_a_private_swarm_uses_a_relay_and_a_stranger_is_refused_by_it(
    world: World, figure: Callable[[str], None]
) -> None:
    relay, home, dialler = world.private
    dialler.do("until_relays", peer=home.peer, count=1, seconds=KNOWN_SECONDS)
    found = dialler.do("connect", peer=home.peer)
    figure(f"a private swarm: a circuit after {found['seconds'] * 1e3:.0f} ms")
    assert found["way"] == "circuit"
    stranger = Peer(world.lab, "p2", flags=["--listen", "/ip4/0.0.0.0/tcp/31337"])
    answer = stranger.ask({"do": "connect", "peer": relay.peer, "addresses": relay.addresses[:1]})
    assert "NotAMember" in answer["error"]
    answer = stranger.ask({"do": "through", "relay": relay.peer, "peer": home.peer})
    assert "error" in answer


def test_a_home_that_nobody_reaches_ends_where_it_must_be_reached_and_says_what_to_do(world: World) -> None:
    assert world.unreached.process.wait(60) == 2
    assert "forward TCP 31335 to 192.168.1.11" in world.unreached.tail()
