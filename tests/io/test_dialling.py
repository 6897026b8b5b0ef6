"""Several addresses of one peer, on a clock that jumps: which are tried, when, and which one wins."""

from __future__ import annotations

import socket

import pytest
import trio

from node.network.addresses import parse_address
from node.network.dialling import race as dialling
from node.network.dialling.race import STAGGER_SECONDS, TRIED_AT_ONCE, TURN_SECONDS, Race
from tensor_codec.errors import NotAMember, PeerGone


def at(*hosts):
    return [
        parse_address(f"/{'ip6' if ':' in h else 'ip4' if h[0].isdigit() else 'dns'}/{h}/tcp/1")
        for h in hosts
    ]


class Network:
    """What becomes of a dial to each host: seconds until it gets through, or until a fault, or silence."""

    def __init__(self, names=None, **hosts):
        self.hosts = {}
        self.names = names or {}
        self.begun = []
        self.under_way = self.most = 0
        self.thrown_away = []

    async def attempt(self, address):
        began = trio.current_time()
        self.begun.append((address.host, began))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            match self.hosts.get(address.host):
                case None:
                    await trio.sleep_forever()
                case float(seconds):
                    await trio.sleep(seconds)
                    return address.host
                case (float(seconds), fault):
                    await trio.sleep(seconds)
                    raise fault
        finally:
            self.under_way -= 1

    async def resolve(self, address):
        await trio.sleep(0.01)
        if address.host not in self.names:
            raise PeerGone("no such name")
        return at(*self.names[address.host])

    def race(self):
        return Race(self.attempt, self.resolve, self.thrown_away.append)


def network(hosts, names=None):
    made = Network(names)
    made.hosts = hosts
    return made


async def test_a_dead_address_costs_a_stagger_and_hides_nobody(autojump_clock):
    net = network({"10.0.0.2": 0.05})
    assert await net.race().run(at("10.0.0.1", "10.0.0.2")) == "10.0.0.2"
    assert trio.current_time() == pytest.approx(STAGGER_SECONDS + 0.05)
    assert net.under_way == 0


async def test_an_address_that_fails_makes_way_at_once(autojump_clock):
    net = network({"10.0.0.1": (0.01, PeerGone("refused")), "10.0.0.2": 0.05})
    race = net.race()
    assert await race.run(at("10.0.0.1", "10.0.0.2")) == "10.0.0.2"
    assert trio.current_time() == pytest.approx(0.06)
    assert [(address.host, str(fault)) for address, fault in race.failures] == [("10.0.0.1", "refused")]


async def test_an_earlier_address_that_is_slower_may_still_win(autojump_clock):
    net = network({"10.0.0.1": 0.3, "10.0.0.2": 0.2})
    assert await net.race().run(at("10.0.0.1", "10.0.0.2")) == "10.0.0.1"


async def test_a_member_of_another_swarm_at_one_address_hides_nobody(autojump_clock):
    net = network({"10.0.0.1": (0.01, NotAMember("another swarm")), "10.0.0.2": 0.05})
    assert await net.race().run(at("10.0.0.1", "10.0.0.2")) == "10.0.0.2"


async def test_at_most_four_are_tried_at_once_and_all_have_their_turn(autojump_clock):
    hosts = [f"10.0.0.{n}" for n in range(1, 9)]
    net = network({"10.0.0.8": 0.1})
    race = net.race()
    assert await race.run(at(*hosts)) == "10.0.0.8"
    assert net.most == TRIED_AT_ONCE
    assert [host for host, _ in net.begun] == hosts
    assert trio.current_time() == pytest.approx(TURN_SECONDS + 3 * STAGGER_SECONDS + 0.1)


async def test_of_two_that_get_through_in_the_same_moment_one_is_kept(autojump_clock):
    both, thrown_away = trio.Event(), []

    async def attempt(address):
        await both.wait()
        return address.host

    async with trio.open_nursery() as nursery:
        race = Race(attempt, dialling.resolve, thrown_away.append)

        async def finish():
            await trio.sleep(2 * STAGGER_SECONDS)
            both.set()

        nursery.start_soon(finish)
        won = await race.run(at("10.0.0.1", "10.0.0.2"))
    assert sorted([won, *thrown_away]) == ["10.0.0.1", "10.0.0.2"]


async def test_what_got_through_as_the_race_was_cut_off_is_thrown_away(autojump_clock):
    net = network({"10.0.0.1": 0.5})
    with trio.CancelScope() as scope:
        real = net.attempt

        async def attempt(address):
            result = await real(address)
            scope.cancel()
            return result

        race = Race(attempt, net.resolve, net.thrown_away.append)
        await race.run(at("10.0.0.1"))
    assert net.thrown_away == ["10.0.0.1"]


async def test_a_race_that_is_cut_off_says_who_was_silent(autojump_clock):
    net = network({"10.0.0.2": (0.0, PeerGone("refused"))})
    race = net.race()
    with trio.move_on_after(3.0):
        await race.run(at("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    assert [address.host for address in race.unanswered] == ["10.0.0.1", "10.0.0.3"]


async def test_all_have_failed(autojump_clock):
    net = network({host: (0.01, PeerGone("refused")) for host in ("10.0.0.1", "10.0.0.2")})
    assert await net.race().run(at("10.0.0.1", "10.0.0.2", "nowhere.example")) is None
    assert await net.race().run([]) is None


async def test_all_addresses_of_a_name_are_dialled_and_its_families_by_turns(autojump_clock):
    net = network({"8.8.4.4": 0.02}, {"node.example": ("8.8.8.8", "8.8.4.4", "2001:db8::1")})
    assert await net.race().run(at("node.example")) == "8.8.4.4"
    assert [host for host, _ in net.begun] == ["8.8.8.8", "2001:db8::1", "8.8.4.4"]


async def test_a_name_that_takes_long_holds_up_no_address(autojump_clock):
    net = network({"10.0.0.1": 0.05})

    async def never(address):
        await trio.sleep_forever()

    assert await Race(net.attempt, never, print).run(at("slow.example", "10.0.0.1")) == "10.0.0.1"
    assert trio.current_time() == pytest.approx(STAGGER_SECONDS + 0.05)


async def test_an_address_that_a_name_gives_too_is_dialled_once(autojump_clock):
    net = network({"10.0.0.1": (0.3, PeerGone("refused"))}, {"node.example": ("10.0.0.1", "10.0.0.1")})
    assert await net.race().run(at("node.example", "10.0.0.1")) is None
    assert len(net.begun) == 1


class Names(trio.abc.HostnameResolver):
    """Answers each family as it is asked for."""

    def __init__(self, answers):
        self.answers = answers

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):
        found = [(f, socket.SOCK_STREAM, 6, "", (a, port)) for f, a in self.answers if family in (0, f)]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "hosts"),
    [
        ("dns4", ["192.0.2.1", "192.0.2.2"]),
        ("dns6", ["2001:db8::1"]),
        ("dns", ["192.0.2.1", "2001:db8::1", "192.0.2.2"]),
    ],
)
async def test_a_name_stands_for_all_its_answers_of_its_family(autojump_clock, kind, hosts):
    four, six = socket.AF_INET, socket.AF_INET6
    names = Names([(four, "192.0.2.1"), (six, "2001:db8::1"), (four, "192.0.2.2"), (six, "fe80::1%eth0")])
    trio.socket.set_custom_hostname_resolver(names)
    try:
        found = await dialling.resolve(parse_address(f"/{kind}/node.example/tcp/7"))
        assert [(each.host, each.port) for each in found] == [(host, 7) for host in hosts]
        trio.socket.set_custom_hostname_resolver(Names([]))
        with pytest.raises(PeerGone, match=r"node\.example has no address: Name or service not known"):
            await dialling.resolve(parse_address(f"/{kind}/node.example/tcp/7"))
    finally:
        trio.socket.set_custom_hostname_resolver(None)
