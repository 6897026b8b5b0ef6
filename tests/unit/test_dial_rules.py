"""Which addresses a node dials, and the pauses after failed dials."""

from __future__ import annotations

import random

import pytest

from node.network.addresses import parse_address
from node.network.dialling.backoff import MAX_KEPT, Backoff
from node.network.dialling.networks import OwnNetworks, block_of
from tensor_codec.limits import Limits

LIMITS = Limits()
PUBLIC, LAN, LOOPBACK = "/ip4/8.8.8.8/tcp/1", "/ip4/192.168.1.7/tcp/1", "/ip4/127.0.0.1/tcp/1"


@pytest.mark.parametrize(
    ("host", "block"),
    [
        ("8.8.8.8", ""),
        ("2a00:1450::1", ""),
        ("10.1.2.3", "10.0.0.0/8"),
        ("172.31.0.1", "172.16.0.0/12"),
        ("172.32.0.1", ""),
        ("192.168.1.1", "192.168.0.0/16"),
        ("100.64.0.1", "100.64.0.0/10"),
        ("fd12::1", "fc00::/7"),
        ("::ffff:10.0.0.1", "10.0.0.0/8"),
        ("127.0.0.9", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("169.254.1.1", "link-local"),
        ("fe80::1%eth0", "link-local"),
    ],
)
def test_each_address_has_its_block(host: str, block: str):
    assert block_of(host) == block


def refused(
    own: list[str], address: str, configured: tuple[str, ...] = (), connected: tuple[str, ...] = ()
) -> bool:
    networks = OwnNetworks()
    networks.set_own(own, listens=bool(own))
    networks.configure(map(parse_address, configured))
    return networks.why_not(parse_address(address), connected) is not None


@pytest.mark.parametrize("address", [LAN, LOOPBACK, "/ip4/169.254.169.254/tcp/80", "/ip6/::1/tcp/1"])
def test_a_node_with_a_public_address_dials_no_peer_s_inner_address(address: str):
    assert refused(["8.8.4.4"], address)
    assert not refused(["8.8.4.4"], PUBLIC)


def test_a_node_dials_private_addresses_of_its_own_block_alone():
    assert not refused(["192.168.0.2"], LAN)
    assert refused(["10.0.0.2"], LAN)
    assert refused(["192.168.0.2"], LOOPBACK)


def test_a_node_on_loopback_dials_loopback_and_no_private_address():
    assert not refused(["127.0.0.1"], "/ip4/127.0.0.9/tcp/1")
    assert refused(["127.0.0.1"], LAN)


def test_a_configured_peer_is_dialled_wherever_it_is_and_its_block_with_it():
    assert not refused(["8.8.4.4"], LAN, configured=(LAN,))
    assert not refused([], "/ip4/127.0.0.1/tcp/9", configured=(LOOPBACK,))
    assert refused([], LAN, configured=(LOOPBACK,))


def test_the_block_that_peers_are_connected_from_is_dialled_too():
    assert not refused(["8.8.4.4"], LOOPBACK, connected=("127.0.0.1",))
    assert refused(["8.8.4.4"], LAN, connected=("127.0.0.1", "8.8.8.8"))


def test_a_host_that_only_dials_for_its_program_dials_everything():
    assert not refused([], LAN)
    assert not refused([], LOOPBACK)


def test_what_a_configured_name_resolves_to_is_configured_and_its_block_with_it():
    """A client that listens nowhere: a gateway in the network of a compose file."""
    networks, name = OwnNetworks(), parse_address("/dns4/bootstrap/tcp/1")
    networks.set_own([], listens=False)
    networks.configure([name])
    lan, neighbour = parse_address(LAN), parse_address("/ip4/192.168.9.9/tcp/7")
    assert networks.why_not(lan) is not None
    networks.resolved(parse_address("/dns4/a-stranger-s/tcp/1"), [lan])
    assert networks.why_not(lan) is not None
    networks.resolved(name, [lan])
    assert networks.is_configured(lan)
    assert networks.why_not(lan) is networks.why_not(neighbour) is None
    assert networks.why_not(parse_address("/ip4/10.0.0.1/tcp/1")) is not None
    networks.resolved(name, [parse_address(PUBLIC)])
    assert not networks.is_configured(lan)
    assert networks.why_not(neighbour) is not None


def test_a_name_is_judged_by_what_it_resolves_to():
    assert not refused(["8.8.4.4"], "/dns4/localhost/tcp/1")


def backoff() -> Backoff:
    return Backoff(LIMITS, random.Random(1))


def test_pauses_double_to_a_minute_less_up_to_half_by_chance():
    pauses, now, seconds = backoff(), 0.0, []
    for _ in range(12):
        pauses.failed("peer", now)
        seconds.append(pauses.seconds_left("peer", now))
        now += seconds[-1]
        assert pauses.seconds_left("peer", now) == 0.0
    for number, pause in enumerate(seconds):
        most = min(LIMITS.dial_pause_seconds, 2.0**number)
        assert most / 2 <= pause <= most
    assert pauses.seconds_left("another", now) == 0.0


def test_a_peer_that_was_reached_before_waits_four_seconds_at_most():
    pauses = backoff()
    pauses.worked("peer")
    for _ in range(12):
        pauses.failed("peer", 0.0)
    assert 2.0 <= pauses.seconds_left("peer", 0.0) <= LIMITS.reached_dial_pause_seconds
    pauses.worked("peer")
    assert pauses.seconds_left("peer", 0.0) == 0.0
    assert pauses.was_reached("peer")
    assert not pauses.was_reached("another")


def test_a_sign_of_life_shortens_a_pause_to_a_second_from_the_failure_and_no_more():
    pauses = backoff()
    for _ in range(12):
        pauses.failed("peer", 100.0)
    pauses.sign_of_life(["peer", "another"])
    assert pauses.seconds_left("peer", 100.0) == 1.0
    pauses.failed("peer", 101.0)
    assert pauses.seconds_left("peer", 101.0) >= LIMITS.dial_pause_seconds / 2
    pauses.sign_of_life(["peer"])
    pauses.sign_of_life(["peer"])
    assert pauses.seconds_left("peer", 101.5) == 0.5


def test_failed_dials_to_one_host_have_a_rate_whatever_the_ports():
    pauses = backoff()
    failed = 0
    while pauses.may_dial_host("8.8.8.8", 0.0):
        pauses.host_failed("8.8.8.8", 0.0)
        failed += 1
    assert failed == LIMITS.failed_dials_per_host_burst
    assert pauses.may_dial_host("8.8.4.4", 0.0)
    assert not pauses.may_dial_host("8.8.8.8", 0.5)
    assert pauses.may_dial_host("8.8.8.8", 1.0)


def test_the_pauses_that_are_kept_are_bounded():
    pauses = backoff()
    for number in range(2 * MAX_KEPT):
        pauses.failed(str(number), 0.0)
        pauses.host_failed(str(number), 0.0)
    assert len(pauses._pauses) == len(pauses._hosts) == MAX_KEPT
    assert pauses.seconds_left(str(2 * MAX_KEPT - 1), 0.0) > 0.0
