import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.addresses import (
    Address,
    Interface,
    InterfaceAddress,
    announced,
    bootstrap_peers,
    dial_order,
    is_inner_interface,
    parse_address,
)
from routing.names import peer_id_of
from tests.fakes import ALICE


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/203.0.113.7/tcp/65535",
        "/ip6/::1/tcp/4001",
        "/ip6/2001:db8::7/tcp/4001",
        "/dns/node.example.org/tcp/4001",
        "/dns4/a-b.example/tcp/1",
        "/dns6/localhost/tcp/1",
    ],
)
def test_an_address_reads_and_writes_the_same(text):
    assert str(parse_address(text)) == text
    with_peer = parse_address(f"{text}/p2p/{ALICE.peer_id}")
    assert with_peer.peer == ALICE.peer_id
    assert str(with_peer) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a TCP multiaddr such as /ip4/127.0.0.1/tcp/4001"),
        ("127.0.0.1:4001", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/udp/4001", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/udp/4001/quic-v1", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/tcp/4001/ws", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/tcp/65536", "port '65536', allowed are 0 to 65535"),
        ("/ip4/127.0.0.1/tcp/-1", "port '-1'"),
        ("/ip4/127.0.0.1/tcp/²", "port '²'"),
        ("/ip4/127.0.0.256/tcp/1", "'127.0.0.256' is not an ip4 address"),
        ("/ip4/::1/tcp/1", "is not an ip4 address"),
        ("/ip6/127.0.0.1/tcp/1", "is not an ip6 address"),
        ("/unix/socket/tcp/1", "begins with /unix, known are /ip4, /ip6, /dns, /dns4, /dns6"),
        (
            "/dnsaddr/example.org/tcp/1",
            "begins with /dnsaddr, known are /ip4, /ip6, /dns, /dns4, /dns6: name the host",
        ),
        ("/dns/-bad.example/tcp/1", "is not a host name"),
        ("/dns/a b/tcp/1", "is not a host name"),
        ("/ip4/127.0.0.1/tcp/1/p2p/nonsense", "nonsense"),
        ("/ip4/127.0.0.1/tcp/1" * 100, "a multiaddr of 2000 characters"),
    ],
)
def test_a_bad_address_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_address(text)


@given(st.text(max_size=80) | st.from_regex(r"/(ip4|ip6|dns)/[^/]{1,20}/tcp/[0-9]{1,6}(/p2p/[^/]*)?"))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == Address(address.kind, address.host, address.port)


def test_wildcards_and_loopback_are_told_apart():
    assert parse_address("/ip4/0.0.0.0/tcp/1").is_wildcard
    assert parse_address("/ip6/::/tcp/1").is_wildcard
    assert parse_address("/ip6/::1/tcp/1").is_loopback
    assert not parse_address("/dns/localhost/tcp/1").is_loopback


# --- what is announced ---


def interface(name, *hosts, **options):
    addresses = tuple(
        host if isinstance(host, InterfaceAddress) else InterfaceAddress(host) for host in hosts
    )
    ports = options.pop("ports", None)
    return Interface(name, addresses, is_inner=is_inner_interface(name, ports), **options)


LOOPBACK = interface("lo", "127.0.0.1", "::1")
DOCKER = interface("docker0", "172.17.0.1", ports=[])
WILDCARD = ["/ip4/0.0.0.0/tcp/4001"]
BOTH = [*WILDCARD, "/ip6/::/tcp/4001"]


def hosts(interfaces, listen=WILDCARD):
    found = announced([parse_address(text) for text in listen], interfaces)
    return [parse_address(text).host for text in found]


@pytest.mark.parametrize(
    ("interfaces", "expected"),
    [
        ([LOOPBACK, DOCKER, interface("eth0", "203.0.113.7")], ["203.0.113.7"]),
        ([LOOPBACK, interface("eth0", "10.0.0.5"), interface("eth1", "8.8.8.8")], ["8.8.8.8", "10.0.0.5"]),
        # in a container, 172.17.0.2 is where others reach it
        ([LOOPBACK, interface("eth0", "172.17.0.2")], ["172.17.0.2"]),
        # a laptop without a network
        ([LOOPBACK], ["127.0.0.1"]),
        ([LOOPBACK, DOCKER], ["172.17.0.1"]),
        ([LOOPBACK, interface("eth0", "169.254.3.4")], ["169.254.3.4"]),
        ([LOOPBACK, interface("eth0", "169.254.3.4"), interface("eth1", "10.0.0.5")], ["10.0.0.5"]),
        ([LOOPBACK, interface("eth0", "10.0.0.5", is_up=False)], ["127.0.0.1"]),
        # a bridge that is the machine's way to its network, virtual machines in it too
        ([LOOPBACK, interface("br0", "192.168.1.5", ports=[True, False])], ["192.168.1.5"]),
        # a VPN is a network like another
        ([LOOPBACK, interface("tailscale0", "100.101.1.2"), interface("eth0", "8.8.8.8")],
         ["8.8.8.8", "100.101.1.2"]),
        ([], []),
    ],
)  # fmt: skip
def test_a_wildcard_announces_what_others_can_dial(interfaces, expected):
    assert hosts(interfaces) == expected


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("docker0", [False]),
        ("docker0", None),
        ("br-0123456789ab", []),
        ("lan-party", [False, False]),
        ("virbr0", []),
        ("veth12ab", None),
        ("cni0", []),
        ("podman1", []),
        ("flannel.1", None),
        ("cali12345", None),
        ("lxdbr0", []),
    ],
)
def test_bridges_of_containers_are_not_announced_beside_others(name, ports):
    inner = interface(name, "172.17.0.1", "10.88.0.1", ports=ports)
    assert hosts([LOOPBACK, inner, interface("enp3s0", "192.168.1.5")]) == ["192.168.1.5"]


@pytest.mark.parametrize(
    "name", ["eth0", "enp3s0", "wlan0", "br-lan", "tun0", "wg0", "bond0", "en0", "venet0"]
)
def test_other_interfaces_are_networks(name):
    assert not is_inner_interface(name, None)


def test_ipv6_is_announced_where_others_can_dial_it_tomorrow():
    eth0 = interface(
        "eth0", "10.0.0.5", "fd12::5",
        InterfaceAddress("2001:db8::aaaa", temporary=True), "2001:db8::5",
        InterfaceAddress("2001:db8:1::7", usable=False), "fe80::1",
    )  # fmt: skip
    assert hosts([LOOPBACK, eth0], BOTH) == ["2001:db8::5", "10.0.0.5", "fd12::5"]
    alone = interface("eth0", InterfaceAddress("2001:db8::aaaa", temporary=True))
    assert hosts([LOOPBACK, alone], BOTH) == ["2001:db8::aaaa"]
    assert hosts([LOOPBACK, interface("eth0", "fe80::1", "10.0.0.5")], BOTH) == ["10.0.0.5"]
    assert hosts([LOOPBACK, interface("eth0", "fe80::1")], BOTH) == ["127.0.0.1", "::1"]


def test_of_many_addresses_a_few_are_announced_and_both_families_among_them():
    eth0 = interface("eth0", "10.0.0.5", *(f"2001:db8:{n}::1" for n in range(9)))
    assert hosts([eth0], BOTH) == ["2001:db8::1", "2001:db8:1::1", "2001:db8:2::1", "10.0.0.5"]


def test_an_address_that_somebody_chose_is_announced():
    interfaces = [LOOPBACK, DOCKER, interface("eth0", "10.0.0.5")]
    assert hosts(interfaces, ["/ip4/172.17.0.1/tcp/1"]) == ["172.17.0.1"]
    assert hosts(interfaces, ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1"]) == ["127.0.0.1", "::1"]
    assert hosts(interfaces, ["/ip4/127.0.0.1/tcp/1", "/ip4/0.0.0.0/tcp/2"]) == ["10.0.0.5"]
    many = [f"/ip4/10.0.0.{n}/tcp/1" for n in range(1, 8)]
    assert hosts(interfaces, many) == [f"10.0.0.{n}" for n in range(1, 8)]


def test_nobody_listens_nothing_is_announced():
    assert hosts([LOOPBACK], []) == []


# --- in which order it is dialled ---


def test_addresses_are_dialled_from_the_farthest_reach_on_and_families_by_turns():
    texts = [
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/172.17.0.1/tcp/1",
        "/ip4/10.0.0.5/tcp/1",
        "/ip6/fd12::5/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
        "/ip4/8.8.4.4/tcp/1",
        "/ip6/2001:db8::5/tcp/1",
        "/dns4/node.example.org/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
    ]
    assert list(map(str, dial_order(map(parse_address, texts)))) == [
        "/ip4/8.8.8.8/tcp/1",
        "/ip6/2001:db8::5/tcp/1",
        "/ip4/8.8.4.4/tcp/1",
        "/dns4/node.example.org/tcp/1",
        "/ip4/172.17.0.1/tcp/1",
        "/ip6/fd12::5/tcp/1",
        "/ip4/10.0.0.5/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
    ]


def test_bootstrap_peers_have_all_their_addresses_in_order():
    peer = peer_id_of(bytes(32))
    texts = [f"/ip4/192.0.2.{number}/tcp/1/p2p/{peer}" for number in (2, 1)]
    assert bootstrap_peers(texts) == {peer: ("/ip4/192.0.2.2/tcp/1", "/ip4/192.0.2.1/tcp/1")}
    assert bootstrap_peers([]) == {}


def test_names_of_ipv6_take_turns_with_those_of_ipv4():
    texts = ["/dns4/a.example/tcp/1", "/dns4/b.example/tcp/1", "/dns6/c.example/tcp/1"]
    found = list(map(str, dial_order(map(parse_address, texts))))
    assert found == ["/dns4/a.example/tcp/1", "/dns6/c.example/tcp/1", "/dns4/b.example/tcp/1"]
