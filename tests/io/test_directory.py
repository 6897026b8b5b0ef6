"""The directory over a network in memory, on a clock that jumps: the peers' views, and their times."""

from __future__ import annotations

import dataclasses
import itertools
import random
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import trio

from node.config import ConfigError
from node.network.addresses import bootstrap_peers
from node.network.directory import announcer, neighbours, pings
from node.network.directory.directory import Directory, DirectoryConfig, open_directory
from node.network.directory.neighbours import PROTOCOL
from node.network.directory.pings import PING_SECONDS, worth_watching
from node.network.reachability.own_reach import OwnReach
from routing.names import peer_id_of
from routing.view import exchange
from routing.view.answers import GRACE_SECONDS
from routing.view.records import Record, sign_record
from routing.view.view import Arrival
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tests.fakes_network import FakeHost, FakeNetwork
from tests.fakes_serving import until

LIMITS = Limits()
SERVER = Record(
    role="serve",
    model="m",
    revision="r",
    blocks=30,
    start=0,
    stop=10,
    dtype="float32",
    seconds_per_block=0.001,
    prefill_seconds_per_token=0.0001,
)
BOOTSTRAP = Record(role="bootstrap")


CONFIG_KEYS = {field.name for field in dataclasses.fields(DirectoryConfig)}


class Swarm:
    """Hosts with a directory each, in one nursery; the first one is the bootstrap peer."""

    def __init__(self, nursery: trio.Nursery, delay: float = 0.01, limits: Limits = LIMITS) -> None:
        self.network = FakeNetwork(delay)
        self.limits = limits
        self.nursery = nursery
        self.nodes: list[Directory] = []
        self.hosts: list[FakeHost] = []
        self.numbers = itertools.count(1)

    async def add(
        self,
        record: Record | None = SERVER,
        bootstrap: list[str] | None = None,
        number: int | None = None,
        **options,
    ) -> Directory:
        """One more node.  record: what it announces, None for a client.  number: makes its identity."""
        number = next(self.numbers) if number is None else number
        directory: Directory = await self.nursery.start(self._run, number, record, bootstrap, options)
        self.nodes.append(directory)
        return directory

    async def _run(self, number, record, bootstrap, options, task_status) -> None:
        async with trio.open_nursery() as nursery:
            host = FakeHost(self.network, number, nursery, self.limits)
            ways_in = [self.hosts[0].multiaddr] if self.hosts and bootstrap is None else bootstrap or []
            self.hosts.append(host)
            settings = {key: options.pop(key) for key in list(options) if key in CONFIG_KEYS}
            settings = {"kademlia": False, "limits": self.limits} | settings
            options = {"rng": random.Random(number)} | options
            async with open_directory(
                host,
                host.identity,
                DirectoryConfig(
                    swarm="public",
                    bootstrap=tuple(ways_in),
                    role=record.role if record else "client",
                    **settings,
                ),
                **options,
            ) as directory:
                if record is not None:
                    await directory.announce(record)
                task_status.started(directory)
                await trio.sleep_forever()

    def kill(self, node: Directory) -> None:
        self.network.kill(node.peer_id)
        self.nodes.remove(node)

    def agree(self) -> bool:
        """Does every node see the same, and every node?"""
        servers = [n for n in self.nodes if n._announcer.announced is not None]
        views = [{r.peer: r.seq for r in node.view().records()} for node in self.nodes]
        return all(view == views[0] and len(view) == len(servers) for view in views)

    async def settled(self, seconds: float = 30.0) -> float:
        """Wait until all agree; return how long that took."""
        began = trio.current_time()
        with trio.fail_after(seconds):
            while not self.agree():  # noqa: ASYNC110  all views at once: there is no one event
                await trio.sleep(0.02)
        return trio.current_time() - began


@pytest.fixture
async def swarm():
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery)
        nursery.cancel_scope.cancel()


async def full_swarm(swarm: Swarm, servers: int) -> None:
    await swarm.add(BOOTSTRAP)
    for number in range(servers):
        await swarm.add(replace(SERVER, start=10 * (number % 3), stop=10 * (number % 3) + 10))
    await swarm.settled()
    await trio.sleep(5.0)  # until each has its neighbours
    await swarm.settled()


async def test_a_client_with_one_bootstrap_address_has_the_whole_view_after_three_delays(
    autojump_clock, swarm
):
    await full_swarm(swarm, 12)
    began = trio.current_time()
    client = await swarm.add(None)
    # two delays to connect, one for our digest, one for the answer: no further round trip
    assert trio.current_time() - began == pytest.approx(4 * swarm.network.delay)
    assert len(client.view().records()) == 13


async def test_a_new_state_is_seen_by_all_within_a_tenth_of_a_second(autojump_clock, swarm):
    await full_swarm(swarm, 20)
    await swarm.add(None)
    await trio.sleep(3.0)
    node = swarm.nodes[7]
    await node.announce(replace(SERVER, state="draining"))
    await trio.sleep(0.1)
    assert {n.view().get(node.peer_id).state for n in swarm.nodes} == {"draining"}


async def test_a_polite_leave_is_seen_by_all_within_two_seconds(autojump_clock, swarm):
    await full_swarm(swarm, 20)
    node = swarm.nodes[5]
    began = trio.current_time()
    await node.leave()
    await trio.sleep(2 * swarm.network.delay)  # what is on its way arrives
    swarm.kill(node)
    await trio.sleep(0.1)
    assert trio.current_time() - began < 2.0
    assert all(n.view().get(node.peer_id) is None for n in swarm.nodes)


async def test_a_killed_node_leaves_every_view_within_its_ttl_and_never_comes_back(autojump_clock, swarm):
    await full_swarm(swarm, 10)
    node = swarm.nodes[4]
    swarm.kill(node)
    last = swarm.nodes[0].view().entries[node.peer_id].sent
    await trio.sleep_until(last + LIMITS.record_ttl_seconds - 1.0)
    assert all(n.view().get(node.peer_id) for n in swarm.nodes)
    await trio.sleep_until(last + LIMITS.record_ttl_seconds + 1.0)
    for _ in range(8):
        assert all(n.view().get(node.peer_id) is None for n in swarm.nodes)
        await trio.sleep(7.0)
    assert swarm.agree()


async def test_who_waits_for_a_change_is_woken_when_a_record_ends(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    node, client = await swarm.add(), await swarm.add(None)
    await trio.sleep(2.0)
    swarm.kill(node)
    with trio.fail_after(100.0):
        while client.view().get(node.peer_id):
            await client.changed()


async def test_nodes_stay_known_for_as_long_as_they_live(autojump_clock, swarm):
    await full_swarm(swarm, 5)
    for _ in range(8):
        await trio.sleep(31.0)
        assert all(len(node.view().records()) == 6 for node in swarm.nodes)


async def test_late_joiners_know_all_and_are_known(autojump_clock, swarm):
    await full_swarm(swarm, 5)
    await trio.sleep(200.0)
    for _ in range(5):
        await swarm.add()
    assert await swarm.settled() < 0.2


async def test_the_swarm_goes_on_without_its_bootstrap_peer(autojump_clock, swarm):
    await full_swarm(swarm, 12)
    swarm.kill(swarm.nodes[0])
    await trio.sleep(100.0)
    await swarm.nodes[3].announce(replace(SERVER, name="still here"))
    await trio.sleep(0.2)
    assert {n.view().get(swarm.nodes[3].peer_id).name for n in swarm.nodes} == {"still here"}


async def test_both_sides_of_a_partition_forget_each_other_and_agree_again_within_a_minute(
    autojump_clock, swarm
):
    await full_swarm(swarm, 11)
    ours, theirs = swarm.nodes[:6], swarm.nodes[6:]
    swarm.network.split([n.peer_id for n in ours], [n.peer_id for n in theirs])
    await trio.sleep(120.0)
    for side in (ours, theirs):
        assert {frozenset(r.peer for r in n.view().records()) for n in side} == {
            frozenset(n.peer_id for n in side)
        }
    swarm.network.heal()
    assert await swarm.settled(60.0) <= 60.0


async def test_thirty_nodes_that_start_at_once_agree_within_seconds(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    async with trio.open_nursery() as nursery:
        for _ in range(29):
            nursery.start_soon(swarm.add)
    assert await swarm.settled() < 10.0


async def test_clocks_do_not_matter(autojump_clock, swarm):
    """Each node has its own idea of the date, days apart; nobody compares them."""
    await swarm.add(BOOTSTRAP)
    for days in (-400.0, -1.0, 0.0, 1.0, 400.0):
        await swarm.add(wall_clock=lambda days=days: 1.8e9 + days * 86400)
    await swarm.settled()
    await trio.sleep(300.0)
    assert swarm.agree()


async def test_a_node_whose_clock_went_back_passes_its_own_older_record(autojump_clock, swarm):
    await full_swarm(swarm, 3)
    node = await swarm.add(wall_clock=lambda: 4e9)
    await swarm.settled()
    number = len(swarm.hosts)
    swarm.kill(node)
    for ttl_passed in (False, True):
        if ttl_passed:
            swarm.kill(swarm.nodes[-1])
            await trio.sleep(LIMITS.record_ttl_seconds + 5)
        again = await swarm.add(
            replace(SERVER, name=f"again {ttl_passed}"), number=number, wall_clock=lambda: 1e9
        )
        assert again.peer_id == node.peer_id
        await trio.sleep(3.0)
        names = {n.view().get(node.peer_id).name for n in swarm.nodes}
        assert names == {f"again {ttl_passed}"}


async def test_two_processes_with_one_identity_do_not_flood_the_swarm(autojump_clock, swarm):
    await full_swarm(swarm, 3)
    first = await swarm.add(replace(SERVER, name="first"))
    second_host = FakeHost(swarm.network, 99, swarm.nursery, LIMITS)
    second_host.identity, second_host.peer_id = swarm.hosts[-1].identity, first.peer_id
    async with open_directory(
        second_host,
        second_host.identity,
        DirectoryConfig(swarm="public", kademlia=False, bootstrap=(swarm.hosts[0].multiaddr,), role="serve"),
        rng=random.Random(0),
    ) as second:
        await second.announce(replace(SERVER, name="second"))
        before = swarm.nodes[0].view().entries[first.peer_id].record.seq
        await trio.sleep(60.0)
        after = swarm.nodes[0].view().entries[first.peer_id].record.seq
    assert after > before
    assert swarm.hosts[0].faults.counts() == {}


# --- liars ----------------------------------------------------------------------------------------


def forged(victim: FakeHost, **changes) -> list[bytes]:
    """Records that must not be believed."""
    liar = victim.identity
    good = replace(
        SERVER,
        peer=liar.peer_id,
        addresses=victim.addresses,
        seq=2**60,
        ttl_seconds=90.0,
        state="offline",
        **changes,
    )
    wire = sign_record(good, liar.private_key)
    flipped = bytearray(wire)
    flipped[20] ^= 1
    other_swarm = sign_record(replace(good, swarm="f00d"), liar.private_key)
    return [bytes(flipped), other_swarm, wire[:-1], b"\x00" * 40]


async def liar(host: FakeHost, victim: FakeHost, wires: list[bytes]) -> list[bytearray]:
    """Send these records as one message each, and return what comes until the stream ends."""
    stream = await host.open_stream(victim.peer_id, victim.addresses, PROTOCOL, seconds=5)
    heard = []
    with trio.move_on_after(2.0):
        for wire in wires:
            for frame in exchange.encode_records([Arrival(SERVER, wire)]):
                await stream.send(frame)
        while (answer := await stream.receive()) is not None:
            heard.append(answer)
    return heard


async def test_forged_records_change_no_view_are_counted_and_end_the_stream(autojump_clock, swarm):
    await full_swarm(swarm, 4)
    host = FakeHost(swarm.network, 77, swarm.nursery, LIMITS)
    target = swarm.hosts[0]
    seen = [r for n in swarm.nodes for r in n.view().records() if r.state != "online"]
    with pytest.raises(PeerGone):
        await liar(host, target, forged(swarm.hosts[2]))
    assert target.faults.counts() == {(host.peer_id, "RecordError"): 3}
    assert seen == [r for n in swarm.nodes for r in n.view().records() if r.state != "online"] == []
    assert host.peer_id not in swarm.nodes[0].neighbours()


async def test_two_bad_records_do_not_end_a_stream_and_the_good_one_between_is_taken(autojump_clock, swarm):
    await full_swarm(swarm, 2)
    host = FakeHost(swarm.network, 77, swarm.nursery, LIMITS)
    own = replace(SERVER, peer=host.peer_id, addresses=host.addresses, seq=1)
    bad = forged(swarm.hosts[1])
    await liar(host, swarm.hosts[0], [bad[0], sign_record(own, host.identity.private_key), bad[1]])
    assert swarm.hosts[0].faults.counts() == {(host.peer_id, "RecordError"): 2}
    await trio.sleep(0.2)
    assert all(node.view().get(host.peer_id) for node in swarm.nodes)


async def test_a_replayed_older_record_is_answered_with_the_newer_one(autojump_clock, swarm):
    await full_swarm(swarm, 2)
    node, host = swarm.nodes[1], FakeHost(swarm.network, 77, swarm.nursery, LIMITS)
    old = swarm.nodes[0].view().entries[node.peer_id]
    await node.announce(replace(SERVER, name="newer"))
    await trio.sleep(0.1)
    heard = await liar(host, swarm.hosts[0], [old.wire])
    assert swarm.nodes[0].view().get(node.peer_id).name == "newer"
    newer = swarm.nodes[0].view().entries[node.peer_id].wire
    assert any(wire == newer for frame in heard for wire, _ in exchange.decode(frame).items)


@pytest.mark.parametrize("frame", [b"", b"\x00", b"\x00\x01\xc0", b"\xff\xff" + bytes(50)])
async def test_garbage_ends_the_stream_and_nothing_else(autojump_clock, swarm, frame):
    await full_swarm(swarm, 2)
    host, target = FakeHost(swarm.network, 77, swarm.nursery, LIMITS), swarm.hosts[0]
    stream = await host.open_stream(target.peer_id, target.addresses, PROTOCOL, seconds=5)
    await stream.send(frame)
    with pytest.raises(PeerGone):
        await stream.receive(5.0)
    assert target.faults.counts() == {(host.peer_id, "MessageError"): 1}
    assert swarm.agree()


async def test_a_flood_of_valid_records_is_read_no_faster_than_the_limit(autojump_clock):
    limits = replace(LIMITS, records_per_peer_per_second=10.0, records_per_peer_burst=50)
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery, limits=limits)
        node = await swarm.add(BOOTSTRAP)
        host = FakeHost(swarm.network, 77, nursery, limits)
        swarm.network.room = 1024
        stream = await host.open_stream(node.peer_id, swarm.hosts[0].addresses, PROTOCOL, seconds=5)

        async def flood():
            for seq in range(1, 10_000):
                own = replace(SERVER, peer=host.peer_id, addresses=host.addresses, seq=seq)
                wire = sign_record(own, host.identity.private_key)
                for frame in exchange.encode_records([Arrival(own, wire)]):
                    await stream.send(frame)

        nursery.start_soon(flood)
        await trio.sleep(10.0)
        assert 100 <= node.view().get(host.peer_id).seq <= 50 + 10 * 10 + 2
        nursery.cancel_scope.cancel()


async def test_a_neighbour_that_does_not_read_is_dropped_and_costs_the_others_nothing(autojump_clock, swarm):
    await full_swarm(swarm, 3)
    host, target = FakeHost(swarm.network, 77, swarm.nursery, LIMITS), swarm.hosts[0]
    swarm.network.room = 512
    await host.open_stream(target.peer_id, target.addresses, PROTOCOL, seconds=5)  # and never reads
    await trio.sleep(0.1)
    swarm.network.room = 256 * 1024
    for number in range(20):
        await swarm.nodes[1].announce(replace(SERVER, name=str(number)))
        await trio.sleep(1.0)
        assert {n.view().get(swarm.nodes[1].peer_id).name for n in swarm.nodes} == {str(number)}
    assert host.peer_id not in swarm.nodes[0].neighbours()
    assert target.faults.counts() == {(host.peer_id, "SlowPeer"): 1}


async def test_a_peer_that_comes_again_has_one_stream(autojump_clock, swarm):
    node = await swarm.add(BOOTSTRAP)
    host, target = FakeHost(swarm.network, 77, swarm.nursery, LIMITS), swarm.hosts[0]
    for _ in range(5):
        await host.open_stream(target.peer_id, target.addresses, PROTOCOL, seconds=5)
        await trio.sleep(0.1)
    assert [n.peer for n in node._neighbours._neighbours] == [host.peer_id]


async def test_only_peers_of_the_verified_view_and_of_the_configuration_are_dialled(autojump_clock, swarm):
    await full_swarm(swarm, 8)
    host = FakeHost(swarm.network, 77, swarm.nursery, LIMITS)
    nowhere = identity = peer_id_of(bytes(32))
    bait = replace(SERVER, peer=host.peer_id, addresses=host.addresses, seq=1, role="client")
    bait = replace(
        bait, model="", revision="", blocks=0, stop=0, seconds_per_block=0.0, prefill_seconds_per_token=0.0
    )
    await liar(
        host, swarm.hosts[0], [sign_record(replace(bait, rtt={nowhere: 0.1}), host.identity.private_key)]
    )
    await trio.sleep(120.0)
    dialled = {to for _, to in swarm.network.dials}
    assert identity not in dialled
    assert host.peer_id not in dialled  # a client serves nobody


# --- coming in ------------------------------------------------------------------------------------


async def say_nothing(stream):
    await trio.sleep_forever()


async def test_no_bootstrap_peer_reachable_is_an_error_that_names_each(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    gone = [FakeHost(FakeNetwork(), number, swarm.nursery, LIMITS).multiaddr for number in (50, 51)]
    host, began = FakeHost(swarm.network, 60, swarm.nursery, LIMITS), trio.current_time()
    with pytest.raises(ConfigError) as caught:
        async with open_directory(
            host, host.identity, DirectoryConfig(swarm="public", bootstrap=tuple(gone), kademlia=False)
        ):
            pass
    assert trio.current_time() - began < 0.1
    for address in gone:
        assert f"{address}: no route to host" in str(caught.value)


async def test_a_silent_bootstrap_peer_is_an_error_at_the_deadline(autojump_clock, swarm):
    mute = FakeHost(swarm.network, 50, swarm.nursery, LIMITS)
    mute.handle(PROTOCOL, say_nothing)
    host = FakeHost(swarm.network, 60, swarm.nursery, LIMITS)
    began = trio.current_time()
    with pytest.raises(ConfigError, match="no answer within"):
        async with open_directory(
            host,
            host.identity,
            DirectoryConfig(swarm="public", bootstrap=(mute.multiaddr,), kademlia=False),
        ):
            pass
    assert trio.current_time() - began <= LIMITS.dial_seconds + neighbours.JOIN_SECONDS + 1


async def test_one_reachable_bootstrap_peer_is_enough_and_the_other_is_tried_again(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    late = FakeHost(FakeNetwork(), 50, swarm.nursery, LIMITS)
    node = await swarm.add(bootstrap=[late.multiaddr, swarm.hosts[0].multiaddr])
    await trio.sleep(20.0)
    assert node.neighbours() == {swarm.nodes[0].peer_id}
    swarm.network.hosts[late.peer_id] = late
    late.handle(PROTOCOL, say_nothing)  # so it is a neighbour for some seconds only
    with trio.fail_after(70.0):
        await until(lambda: late.peer_id in node.neighbours())


async def test_a_peer_that_is_not_there_is_dialled_ever_less_often(autojump_clock, swarm):
    late = FakeHost(FakeNetwork(), 50, swarm.nursery, LIMITS)
    await swarm.add(bootstrap=[late.multiaddr], required=False)
    await trio.sleep(600.0)
    dials = [to for _, to in swarm.network.dials if to == late.peer_id]
    assert 10 <= len(dials) <= 30


async def test_a_stream_of_records_on_which_the_opener_is_silent_ends_after_five_seconds(
    autojump_clock, swarm
):
    node = await swarm.add(BOOTSTRAP)
    mute = FakeHost(swarm.network, 50, swarm.nursery, LIMITS)
    (host,) = swarm.hosts
    stream = await mute.open_stream(host.peer_id, host.addresses, PROTOCOL, seconds=1)
    await trio.sleep(LIMITS.frame_start_seconds - 0.1)
    assert node.neighbours() == {mute.peer_id}
    await trio.sleep(0.2)
    assert node.neighbours() == set()
    assert host.faults.count(mute.peer_id, SlowPeer) == 1
    await stream.aclose()


async def test_a_neighbour_that_falls_silent_is_asked_and_given_up(autojump_clock, swarm):
    node = await swarm.add(BOOTSTRAP)
    mute = FakeHost(swarm.network, 50, swarm.nursery, LIMITS)
    (host,) = swarm.hosts
    stream = await mute.open_stream(host.peer_id, host.addresses, PROTOCOL, seconds=1)
    for frame in exchange.encode_digest({}, ask=False):
        await stream.send(frame)
    idle = LIMITS.records_idle_seconds + LIMITS.reply_taken_seconds
    await trio.sleep(idle - 1.0)
    assert node.neighbours() == {mute.peer_id}
    await trio.sleep(2.0)
    assert node.neighbours() == set()


async def test_a_neighbour_that_has_nothing_to_say_answers_and_stays(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    client = await swarm.add(None)
    (host, _) = swarm.hosts
    with trio.move_on_after(600.0):
        while True:
            assert client.neighbours() == {host.peer_id}
            await trio.sleep(1.0)


async def test_a_node_told_not_to_insist_comes_in_when_its_bootstrap_peer_appears(autojump_clock, swarm):
    first = FakeHost(swarm.network, 1, swarm.nursery, LIMITS)
    del swarm.network.hosts[first.peer_id]
    swarm.hosts.append(first)
    node = await swarm.add(number=2, required=False)
    swarm.hosts.pop(0)
    await trio.sleep(30.0)
    swarm.network.hosts[first.peer_id] = first
    async with open_directory(
        first, first.identity, DirectoryConfig(swarm="public", kademlia=False, role="bootstrap")
    ) as directory:
        with trio.fail_after(60.0):
            while directory.view().get(node.peer_id) is None:
                await directory.changed()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "lacks /p2p/ID"),
        ("127.0.0.1:4001", "not a TCP multiaddr"),
        ("/ip4/0.0.0.0/tcp/4001/p2p/" + peer_id_of(bytes(32)), "to listen on"),
        ("/ip4/127.0.0.1/tcp/0/p2p/" + peer_id_of(bytes(32)), "to listen on"),
        ("/ip4/127.0.0.1/tcp/4001/p2p/QmNobody", "QmNobody"),
    ],
)
def test_a_bootstrap_address_that_cannot_be_dialled_is_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        bootstrap_peers([text])


async def test_several_addresses_of_one_bootstrap_peer_are_one_peer():
    peer = peer_id_of(bytes(32))
    texts = [f"/ip4/192.0.2.{n}/tcp/1/p2p/{peer}" for n in (1, 2)]
    assert bootstrap_peers(texts) == {peer: ("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/1")}


async def test_an_address_that_nobody_could_dial_is_not_announced(autojump_clock, swarm):
    host = FakeHost(swarm.network, 60, swarm.nursery, LIMITS)
    host.addresses = ("/ip6/fe80::1%eth0/tcp/4001",)
    with pytest.raises(ConfigError, match="no peer could dial"):
        async with open_directory(host, host.identity, DirectoryConfig(swarm="public", kademlia=False)):
            pass


def addresses_seen(swarm, node):
    return {n.view().get(node.peer_id).addresses for n in swarm.nodes}


async def test_who_gets_another_address_announces_it_within_half_a_minute(autojump_clock, swarm):
    await full_swarm(swarm, 4)
    node, host = swarm.nodes[2], swarm.hosts[2]
    host.addresses_of_the_machine = ("/ip4/192.0.2.7/tcp/4001",)
    await trio.sleep(announcer.ADDRESSES_SECONDS + 2.0)
    assert addresses_seen(swarm, node) == {host.addresses_of_the_machine}


async def test_who_loses_its_neighbours_looks_at_its_addresses_at_once(autojump_clock, swarm):
    await full_swarm(swarm, 4)
    node, host = swarm.nodes[2], swarm.hosts[2]
    await trio.sleep(announcer.ADDRESSES_PAUSE_SECONDS)
    host.addresses_of_the_machine = ("/ip4/192.0.2.7/tcp/4001",)
    swarm.network.split([node.peer_id], [n.peer_id for n in swarm.nodes if n is not node])
    await trio.sleep(announcer.ADDRESSES_PAUSE_SECONDS + 0.1)
    assert node.view().get(node.peer_id).addresses == host.addresses_of_the_machine
    swarm.network.heal()
    await trio.sleep(3.0)
    assert addresses_seen(swarm, node) == {host.addresses_of_the_machine}


async def test_who_keeps_its_addresses_announces_no_oftener(autojump_clock, swarm):
    await full_swarm(swarm, 2)
    said = []
    node = swarm.nodes[1]
    real = node._announcer._publish

    def publish(record):
        said.append(trio.current_time())
        real(record)

    node._announcer._publish = publish
    await trio.sleep(10 * LIMITS.announce_seconds)
    assert len(said) <= 12  # one for distances that have changed


async def test_a_server_that_nobody_reaches_covers_no_block_but_in_its_own_house(autojump_clock, swarm):
    home = OwnReach("none", (), (), ("/ip4/192.168.1.11/tcp/4001",), "203.0.113.7")
    await full_swarm(swarm, 2)
    server, client = swarm.nodes[2], await swarm.add(None)
    await swarm.settled()
    assert len(client.view().spans(SERVER.revision)) == 2
    server.set_reach(home)
    await trio.sleep(1.0)
    view = client.view()
    assert [span.peer for span in view.spans(SERVER.revision)] == [swarm.nodes[1].peer_id]
    assert (
        view.get(server.peer_id).state == "online"
    )  # for peers next door, who have the same outside address
    assert view.dialled_at(view.get(server.peer_id)) == ()
    client.set_seen(["203.0.113.7"])
    view = client.view()
    assert len(view.spans(SERVER.revision)) == 2
    assert client.addresses(server.peer_id) == home.lan
    server.set_reach(dataclasses.replace(home, lan=()))
    await trio.sleep(1.0)
    assert client.view().get(server.peer_id).state == "joining"  # older versions know no better
    server.set_reach(OwnReach("public", ("/ip4/203.0.113.7/tcp/4001",)))
    await trio.sleep(1.0)
    record = client.view().get(server.peer_id)
    assert (record.state, record.reach, record.addresses) == (
        "online",
        "public",
        ("/ip4/203.0.113.7/tcp/4001",),
    )


async def test_the_first_node_of_a_swarm_waits_for_nobody(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    assert trio.current_time() == 0.0


async def test_a_node_may_find_itself_in_its_bootstrap_list(autojump_clock, swarm):
    node = await swarm.add(bootstrap=[FakeHost(FakeNetwork(), 1, swarm.nursery, LIMITS).multiaddr])
    await trio.sleep(10.0)
    assert swarm.network.dials == []
    assert node.view().get(node.peer_id)


# --- distances, and finding -----------------------------------------------------------------------


async def test_servers_say_how_far_those_are_that_may_come_before_or_behind_them(autojump_clock, swarm):
    await full_swarm(swarm, 6)
    await trio.sleep(5.0)
    view = swarm.nodes[0].view()
    for first in (r for r in view.spans("r") if r.start == 0):
        followers = {r.peer for r in view.spans("r") if r.start == 10}
        assert followers <= first.rtt.keys()
        assert first.rtt[min(followers)] == pytest.approx(2 * swarm.network.delay)
        for follower in followers:
            assert view.get(follower).rtt[first.peer] == pytest.approx(2 * swarm.network.delay)


def count_pings(host) -> list:
    pings, real = [], host.ping

    async def counting(peer, addresses, **options):
        pings.append(peer)
        return await real(peer, addresses, **options)

    host.ping = counting
    return pings


async def test_a_distance_is_measured_once_a_minute_and_the_dead_are_left_alone(autojump_clock, swarm):
    await full_swarm(swarm, 2)
    client = await swarm.add(None, watch=False)
    pings = count_pings(swarm.hosts[-1])
    peers = [record.peer for record in client.view().spans("r")]
    swarm.kill(swarm.nodes[2])
    for _ in range(3):
        began = trio.current_time()
        assert await client.measure(peers, 1.0) == {swarm.nodes[1].peer_id: pytest.approx(0.02)}
        assert trio.current_time() - began <= 1.0
    assert pings == [swarm.nodes[1].peer_id]
    await trio.sleep(61.0)
    await client.measure(peers, 1.0)
    assert len(pings) == 2


def holds(*peers):
    return lambda known: known.keys() >= set(peers)


async def test_who_can_do_without_a_silent_peer_waits_for_it_a_moment_and_once(autojump_clock, swarm):
    await full_swarm(swarm, 3)
    there, also_there, silent = (node.peer_id for node in swarm.nodes[1:])
    swarm.network.black_holes.add(silent)
    client = await swarm.add(None, watch=False)
    enough = holds(there, also_there)
    for most in (2 * GRACE_SECONDS, 0.0, 0.0):
        began = trio.current_time()
        assert (await client.measure([there, also_there, silent], 1.0, enough)).keys() == {there, also_there}
        assert trio.current_time() - began <= most + 2 * swarm.network.delay * (most > 0)
    assert client.late() == {silent}
    await trio.sleep(PING_SECONDS)  # the question goes on without a task that waits
    assert client.late() == set()
    assert client.unknown([there, silent]) == []  # and silence is noted


async def test_who_cannot_do_without_a_silent_peer_waits_for_its_answer_once(autojump_clock, swarm):
    await full_swarm(swarm, 2)
    there, silent = (node.peer_id for node in swarm.nodes[1:])
    swarm.network.black_holes.add(silent)
    client = await swarm.add(None, watch=False)
    for seconds in (1.0, 0.0):
        began = trio.current_time()
        assert (await client.measure([there, silent], 1.0, holds(there, silent))).keys() == {there}
        assert trio.current_time() - began == pytest.approx(seconds)


async def test_a_question_whose_asker_has_gone_away_is_answered_all_the_same(autojump_clock, swarm):
    await full_swarm(swarm, 1)
    client = await swarm.add(None, watch=False)
    with trio.move_on_after(0.001) as scope:
        await client.measure([swarm.nodes[1].peer_id])
    assert scope.cancelled_caught
    await trio.sleep(0.1)
    assert client.rtts().keys() == {swarm.nodes[1].peer_id}


# --- who is there ---------------------------------------------------------------------------------


def seen_online(directory):
    return {record.peer for record in directory.view().spans("r")}


async def until_seen(directory, peers, seconds=10.0):
    """How long it takes until these are the servers that can be used."""
    began = trio.current_time()
    with trio.fail_after(seconds):
        while seen_online(directory) != {node.peer_id for node in peers}:
            await directory.changed()
    return trio.current_time() - began


@pytest.mark.parametrize("times", range(3))
async def test_a_client_knows_within_ten_seconds_who_is_gone_and_who_is_back(autojump_clock, swarm, times):
    await full_swarm(swarm, 4)
    client = await swarm.add(None)
    node, *others = swarm.nodes[1:5]
    await trio.sleep(20.0 + times)
    assert seen_online(client) == {each.peer_id for each in swarm.nodes[1:5]}
    swarm.network.black_holes.add(node.peer_id)
    await until_seen(client, others)
    assert client.view().silent == {node.peer_id}
    assert client.view().get(node.peer_id)  # its record is still there
    swarm.network.black_holes.clear()
    await until_seen(client, [node, *others])
    swarm.kill(node)
    await until_seen(client, others)
    assert client.view().spans("r", silent=True)[0].peer in {each.peer_id for each in swarm.nodes} | {
        node.peer_id
    }


async def test_a_new_client_knows_within_two_seconds_who_was_never_there(autojump_clock, swarm):
    await full_swarm(swarm, 4)
    swarm.network.black_holes.add(swarm.nodes[1].peer_id)
    await until_seen(await swarm.add(None), swarm.nodes[2:5], 2.0)


async def test_a_server_believes_records_and_marks_nobody(autojump_clock, swarm):
    await full_swarm(swarm, 4)
    swarm.network.black_holes.add(swarm.nodes[1].peer_id)
    await trio.sleep(20.0)
    assert swarm.nodes[2].view().silent == frozenset()
    assert swarm.nodes[1].peer_id in seen_online(swarm.nodes[2])


async def test_of_many_servers_a_client_asks_a_few_and_those_that_it_wants_to_use(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    client, other = await swarm.add(None, watch=False), await swarm.add(None, watch=False)
    for directory in (client, other):
        for number in range(100, 150):
            record = replace(
                SERVER, peer=peer_id_of(number.to_bytes(32, "big")), addresses=("/ip4/192.0.2.1/tcp/1",),
                swarm="public", seq=1, ttl_seconds=90.0,
            )  # fmt: skip
            directory._live.merge([Arrival(record, b"")])
    servers = [record.peer for record in client.view().spans("r")]
    watched = worth_watching(client.peer_id, client.view, [])
    assert len(watched) == pings.WATCHED
    assert set(watched) != set(worth_watching(other.peer_id, other.view, []))  # not all clients the same ones
    assert set(servers[:5]) <= set(worth_watching(client.peer_id, client.view, servers[:5])) < set(servers)
    assert len(worth_watching(client.peer_id, client.view, servers[:5])) == pings.WATCHED


class FakeTable:
    """A Kademlia table that all peers share: a dict."""

    def __init__(self) -> None:
        self.providers: dict[str, dict] = {}
        self.slow = False

    def at(self, host: FakeHost) -> FakeTable.Finder:
        return FakeTable.Finder(self, host)

    class Finder:
        def __init__(self, table: FakeTable, host: FakeHost) -> None:
            self.table, self.host = table, host

        async def provide(self, revision):
            await trio.sleep(0.1)
            self.table.providers.setdefault(revision, {})[self.host.peer_id] = self.host.addresses

        async def find(self, revision, seconds):
            await trio.sleep(seconds if self.table.slow else 0.1)
            return dict(self.table.providers.get(revision, {}))


async def test_peers_that_no_neighbour_knows_are_found_through_the_table(autojump_clock):
    table = FakeTable()
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        network = FakeNetwork()

        async def node(number, record, ways_in=()):
            host = FakeHost(network, number, nursery, LIMITS)
            directory = await stack.enter_async_context(
                open_directory(
                    host,
                    host.identity,
                    DirectoryConfig(swarm="public", bootstrap=tuple(ways_in)),
                    finder=table.at(host),
                    rng=random.Random(1),
                )
            )
            if record:
                await directory.announce(record)
            return host, directory

        island_host, _ = await node(1, SERVER)
        await node(2, replace(SERVER, start=10, stop=20), [island_host.multiaddr])
        await trio.sleep(2.0)
        _, client = await node(3, None)
        assert client.view().records() == ()
        assert len(await client.find_peers("r")) == 2
        assert client.neighbours() or client.view().records()
        table.slow = True
        began = trio.current_time()
        assert len(await client.find_peers("r", seconds=3.0)) == 2
        assert trio.current_time() - began <= 3.0
        nursery.cancel_scope.cancel()


async def test_two_islands_that_share_only_the_table_become_one_swarm(autojump_clock):
    table = FakeTable()
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        network = FakeNetwork()
        directories = []
        for number in (1, 2):
            host = FakeHost(network, number, nursery, LIMITS)
            directory = await stack.enter_async_context(
                open_directory(
                    host, host.identity, DirectoryConfig(swarm="public", role="serve"), finder=table.at(host)
                )
            )
            await directory.announce(SERVER)
            directories.append(directory)
        await trio.sleep(80.0)
        assert all(len(d.view().records()) == 2 for d in directories)
        nursery.cancel_scope.cancel()


# --- ending ---------------------------------------------------------------------------------------


async def test_nothing_of_a_directory_is_left_when_its_block_ends(autojump_clock):
    async with trio.open_nursery() as nursery:
        network = FakeNetwork()
        host, other = (FakeHost(network, number, nursery, LIMITS) for number in (1, 2))
        async with open_directory(
            host, host.identity, DirectoryConfig(swarm="public", kademlia=False, role="bootstrap")
        ) as directory:
            before = len(nursery.child_tasks)
            async with open_directory(
                other,
                other.identity,
                DirectoryConfig(swarm="public", bootstrap=(host.multiaddr,), kademlia=False),
            ):
                assert directory.neighbours() == {other.peer_id}
            await trio.sleep(0.1)
            assert directory.neighbours() == frozenset()
            assert len(nursery.child_tasks) == before
        stream = await other.open_stream(host.peer_id, host.addresses, PROTOCOL, seconds=1)
        assert await stream.receive(1.0) is None  # a directory that has ended says nothing
        assert len(nursery.child_tasks) == 0


async def test_leaving_waits_two_seconds_at_the_most_for_a_neighbour_that_does_not_read(
    autojump_clock, swarm
):
    node = await swarm.add()
    swarm.network.room = 1
    host = FakeHost(swarm.network, 77, swarm.nursery, LIMITS)
    await host.open_stream(node.peer_id, swarm.hosts[0].addresses, PROTOCOL, seconds=5)
    await trio.sleep(0.1)
    await node.announce(SERVER)
    await trio.sleep(0.1)
    began = trio.current_time()
    await node.leave()
    assert trio.current_time() - began == pytest.approx(announcer.LEAVE_SECONDS)


async def test_who_has_left_or_never_announced_says_no_more(autojump_clock, swarm):
    await swarm.add(BOOTSTRAP)
    node, client = await swarm.add(), await swarm.add(None)
    await client.leave()
    await node.leave()
    await trio.sleep(300.0)
    assert [r.peer for r in swarm.nodes[0].view().records()] == [swarm.nodes[0].peer_id]


async def test_an_announcement_that_nobody_would_accept_is_an_error_and_is_not_repeated(
    autojump_clock, swarm
):
    node = await swarm.add()
    with pytest.raises(ValueError, match="stop is 31"):
        await node.announce(replace(SERVER, stop=31))
    await trio.sleep(200.0)
    assert node.view().get(node.peer_id).stop == 10
