"""What a router is asked, in which order and when: the promises of `MappingPlan`."""

from __future__ import annotations

import pytest

from node.network.mapping.default_route import default_gateway, default_routes
from node.network.mapping.plan import (
    FIRST_PAUSE_SECONDS,
    LEASE_SECONDS,
    LEAST_RENEWAL_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MAX_PORTS,
    METHODS,
    RENEWAL_SECONDS,
    Ask,
    Forwarding,
    MappingPlan,
    Method,
    Release,
    Wait,
    ports_to_map,
)

HOSTS = frozenset({"192.168.1.11"})
OUTSIDE = "203.0.113.7"


def plan_for(*ports: int) -> MappingPlan:
    plan = MappingPlan()
    plan.set_ports(dict.fromkeys(ports, HOSTS), 0.0)
    return plan


def asked(plan: MappingPlan, now: float) -> Ask:
    found = plan.next(now)
    assert isinstance(found, Ask)
    return found


def grant(plan: MappingPlan, now: float, *, host: str = OUTSIDE, lease: int = LEASE_SECONDS) -> Forwarding:
    ask = asked(plan, now)
    forwarding = Forwarding(ask.method, ask.port, host, ask.outside_port, lease)
    plan.granted(ask, forwarding, now)
    return forwarding


def refuse_round(plan: MappingPlan, now: float) -> list[str]:
    methods: list[str] = []
    while isinstance(ask := plan.next(now), Ask):
        methods.append(ask.method)
        plan.refused(ask, "no", now)
    return methods


def addresses(plan: MappingPlan) -> list[tuple[str, str]]:
    return [(str(address), origin) for address, origin in plan.extra()]


def test_nat_pmp_is_asked_first_then_upnp_and_afterwards_the_one_that_worked():
    plan = plan_for(31330)
    first = asked(plan, 0.0)
    assert first == Ask("nat-pmp", 31330, HOSTS, 31330)
    plan.refused(first, "silence", 0.0)
    assert grant(plan, 0.0).method == "upnp"
    assert addresses(plan) == [(f"/ip4/{OUTSIDE}/tcp/31330", "upnp")]
    assert refuse_round(plan, LEASE_SECONDS / 2) == ["upnp", "nat-pmp"]


def test_a_forwarding_is_renewed_at_half_its_lease_and_with_its_port():
    plan = plan_for(31330)
    ask = asked(plan, 0.0)
    plan.granted(ask, Forwarding("nat-pmp", 31330, OUTSIDE, 40_000, 100), 0.0)
    assert plan.next(1.0) == Wait(49.0)
    assert asked(plan, 50.0).outside_port == 40_000


@pytest.mark.parametrize("method", METHODS)
def test_a_router_that_has_started_again_with_another_address_is_noticed_long_before_the_lease_ends(
    method: Method,
):
    plan = plan_for(31330)
    if method == "upnp":
        plan.refused(asked(plan, 0.0), "silence", 0.0)
    grant(plan, 0.0)
    later = RENEWAL_SECONDS[method]
    assert later < LEASE_SECONDS / 2
    assert asked(plan, later).method == method
    grant(plan, later, host="198.51.100.9")
    assert addresses(plan) == [("/ip4/198.51.100.9/tcp/31330", method)]


@pytest.mark.parametrize(
    ("lease", "renewed_after"),
    [
        (1, LEAST_RENEWAL_SECONDS),
        (0, RENEWAL_SECONDS["nat-pmp"]),
        (10**9, RENEWAL_SECONDS["nat-pmp"]),
    ],
)
def test_the_strangest_lease_leads_neither_to_a_flood_nor_to_sleep(lease: int, renewed_after: float):
    plan = plan_for(31330)
    grant(plan, 0.0, lease=lease)
    assert isinstance(plan.next(renewed_after - 0.1), Wait)
    assert isinstance(plan.next(renewed_after), Ask)


def test_an_address_stays_until_its_lease_is_over_and_no_longer():
    plan = plan_for(31330)
    grant(plan, 0.0)
    refuse_round(plan, LEASE_SECONDS / 2)
    plan.next(LEASE_SECONDS - 1)
    assert addresses(plan)
    refuse_round(plan, LEASE_SECONDS)
    assert not addresses(plan)


def test_rounds_of_refusals_come_ever_later_up_to_half_an_hour():
    plan, now, pauses = plan_for(31330), 0.0, []
    for _ in range(8):
        assert refuse_round(plan, now) == ["nat-pmp", "upnp"]
        found = plan.next(now)
        assert isinstance(found, Wait)
        pauses.append(found.seconds)
        now += found.seconds
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize(
    "host", ["100.64.3.4", "10.0.0.1", "192.168.0.2", "0.0.0.0", "127.0.0.1", "224.0.0.1"]
)
def test_a_router_whose_own_address_is_not_public_gives_no_address_and_is_released(host: str):
    plan = plan_for(31330)
    forwarding = grant(plan, 0.0, host=host)
    assert not addresses(plan)
    assert plan.next(0.0) == Release(forwarding)
    assert plan.next(0.0) == Wait(FIRST_PAUSE_SECONDS)
    assert host in plan.refusals["nat-pmp"]


def test_a_port_without_a_listener_is_released():
    plan = plan_for(31330)
    forwarding = grant(plan, 0.0)
    plan.set_ports({31331: HOSTS}, 1.0)
    assert plan.next(1.0) == Release(forwarding)
    assert asked(plan, 1.0).port == 31331


def test_a_grant_that_comes_after_its_listener_has_gone_is_released():
    plan = plan_for(31330)
    ask = asked(plan, 0.0)
    plan.set_ports({}, 1.0)
    forwarding = Forwarding("nat-pmp", 31330, OUTSIDE, 31330)
    plan.granted(ask, forwarding, 1.0)
    assert plan.next(1.0) == Release(forwarding)


def test_another_address_of_this_machine_has_the_router_asked_anew():
    plan = plan_for(31330)
    grant(plan, 0.0)
    plan.set_ports({31330: frozenset({"10.1.2.3"})}, 5.0)
    assert asked(plan, 5.0).hosts == {"10.1.2.3"}


def test_who_looks_again_asks_at_once_whatever_the_pause():
    plan = plan_for(31330)
    refuse_round(plan, 0.0)
    plan.look_again(1.0)
    assert asked(plan, 1.0).method == "nat-pmp"


def test_a_renewal_at_another_port_of_the_router_releases_the_first():
    plan = plan_for(31330)
    plan.refused(asked(plan, 0.0), "silence", 0.0)
    first = grant(plan, 0.0)
    later = LEASE_SECONDS / 2
    ask = asked(plan, later)
    plan.granted(ask, Forwarding("upnp", 31330, OUTSIDE, 40_000), later)
    assert plan.next(later) == Release(first)
    assert addresses(plan) == [(f"/ip4/{OUTSIDE}/tcp/40000", "upnp")]


def test_nat_pmp_replaces_its_forwarding_itself_and_a_release_would_delete_the_new_one():
    plan = plan_for(31330)
    grant(plan, 0.0)
    later = LEASE_SECONDS / 2
    plan.granted(asked(plan, later), Forwarding("nat-pmp", 31330, OUTSIDE, 40_000), later)
    assert isinstance(plan.next(later), Wait)


def test_all_is_released_at_the_end_also_what_was_asked_and_not_answered_yet():
    plan = plan_for(31330, 31331)
    forwarding = grant(plan, 0.0)
    pending = asked(plan, 0.0)
    assert plan.releases() == [forwarding, Forwarding("nat-pmp", pending.port, "", pending.outside_port)]
    plan.refused(pending, "no", 0.0)
    assert plan.releases() == [forwarding]


@pytest.mark.parametrize(
    ("listening", "expected"),
    [
        ([], {}),
        (["/ip4/127.0.0.1/tcp/31330"], {}),
        (["/ip6/2001:db8::1/tcp/31330"], {}),
        (["/dns4/node.example.org/tcp/31330"], {}),
        (["/ip4/192.168.1.11/tcp/31330"], {31330: HOSTS}),
        (
            ["/ip4/192.168.1.11/tcp/31330", "/ip4/10.0.0.2/tcp/31330"],
            {31330: frozenset({"192.168.1.11", "10.0.0.2"})},
        ),
        (["/ip4/192.168.1.11/tcp/31330", "/ip4/203.0.113.12/tcp/31330"], {}),
        (["/ip4/169.254.3.4/tcp/31330"], {}),
    ],
)
def test_ports_are_forwarded_to_private_addresses_and_where_there_is_no_public_one(listening, expected):
    assert ports_to_map(listening) == expected


def test_a_node_asks_for_few_ports():
    assert len(ports_to_map(f"/ip4/192.168.1.11/tcp/{port}" for port in range(1, 100))) == MAX_PORTS


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
tun0\t00000000\t0101080A\t0003\t0\t0\t600\t00000000\t0\t0\t0
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t50\t00000000\t0\t0\t0
wlan0\t0001A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0
eth9\t00000000\t0201A8C0\t0002\t0\t0\t1\t00000000\t0\t0\t0
"""


def test_the_router_is_the_gateway_of_the_default_route_that_is_up_and_has_the_least_metric():
    assert default_gateway(ROUTES) == "192.168.1.1"


@pytest.mark.parametrize("table", ["", "Iface\n", "Iface\nnonsense\n", "Iface\na b c d e f g h\n"])
def test_a_table_without_a_default_route_has_no_router(table: str):
    assert default_gateway(table) is None
    assert default_routes(table) == []


def test_a_default_route_without_a_gateway_as_of_a_vpn_is_a_way_out_without_a_router():
    table = "Iface\nwg0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n"
    assert default_routes(table) == [(0, None)]
    assert default_gateway(table) is None
