"""The Kademlia table over a network in memory, and beside py-libp2p's own over loopback."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message as Libp2pMessage
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from node.network.directory.kademlia.contact import Contact
from node.network.directory.kademlia.kademlia import (
    ASK_SECONDS,
    PROTOCOL,
    Kademlia,
    Knowledge,
    open_kademlia,
    provider_key,
)
from node.network.directory.kademlia.messages import Kind, Message, encode, encode_varint
from node.network.directory.kademlia.stream import MessageStream
from node.network.host import Host, open_host
from node.network.transport.identity import load_or_create_identity
from routing.names import PeerId
from tensor_codec.errors import FrameError, MessageError, PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tests.fakes_network import FakeHost, FakeNetwork, PipeEnd

LIMITS = Limits()
KEY = provider_key("public", "r")


class Tables:
    """Hosts with a table each.  Everybody's addresses are known to all, as by their records."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = FakeNetwork()
        self.nursery = nursery
        self.hosts: list[FakeHost] = []
        self.unreached: set[PeerId] = set()  # nobody can dial these

    async def add(self, *, serves: bool = True, ways_in: int = 1, limits: Limits = LIMITS) -> Kademlia:
        """One more host; its ways in are the first ones."""
        host = FakeHost(self.network, len(self.hosts) + 1, self.nursery, limits)
        table: Kademlia = await self.nursery.start(self._run, host, self.hosts[:ways_in], serves, limits)
        self.hosts.append(host)
        return table

    async def _run(
        self, host: FakeHost, ways_in: list[FakeHost], serves: bool, limits: Limits, task_status: object
    ) -> None:
        knowledge = Knowledge(
            "public", {each.peer_id: each.addresses for each in ways_in}, self.addresses,
            is_dialled=lambda: host.peer_id not in self.unreached,
        )  # fmt: skip
        async with open_kademlia(host, knowledge, limits, random.Random(1), serves=serves) as table:
            task_status.started(table)  # type: ignore[attr-defined]  # trio's TaskStatus
            await trio.sleep_forever()

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        host = self.network.hosts.get(peer)
        return () if host is None else host.addresses

    async def stream(self, number: int, victim: int = 0) -> PipeEnd:
        """A stream of a stranger."""
        host, other = FakeHost(self.network, number, self.nursery, LIMITS), self.hosts[victim]
        return await host.open_bytes(other.peer_id, other.addresses, PROTOCOL, seconds=1)


@pytest.fixture
async def tables() -> AsyncIterator[Tables]:
    async with trio.open_nursery() as nursery:
        yield Tables(nursery)
        nursery.cancel_scope.cancel()


async def ask(stream: PipeEnd, question: Message, seconds: float = 1.0) -> Message | None:
    messages = MessageStream(stream, PeerId("node"), LIMITS.kademlia_message_bytes)
    await messages.send(question, seconds)
    return await messages.receive(seconds)


async def test_servers_of_a_revision_are_found_through_the_table(autojump_clock: object, tables: Tables):
    for _ in range(6):
        await (await tables.add()).provide("r")
    client = await tables.add(serves=False)
    found = await client.find("r", 5.0)
    assert found == {host.peer_id: host.addresses for host in tables.hosts[:6]}
    assert await client.find("another", 5.0) == {}


async def test_peers_that_ask_enter_the_table_once_they_have_answered_and_clients_never(
    autojump_clock: object, tables: Tables
):
    first = await tables.add()
    server, client = await tables.add(), await tables.add(serves=False)
    await server.find("r", 1.0)
    await client.find("r", 1.0)
    await trio.sleep(1.0)
    assert tables.hosts[1].peer_id in first.table
    assert len(first.table) == 1
    assert tables.hosts[0].peer_id in client.table


async def test_a_node_that_nobody_can_dial_asks_as_a_client_does_and_leaves_the_tables_of_others(
    autojump_clock: object, tables: Tables
):
    first, home = await tables.add(), await tables.add()
    await home.provide("r")
    await trio.sleep(1.0)
    peer = tables.hosts[1].peer_id
    assert peer in first.table
    tables.unreached.add(peer)
    contact = Contact(peer, tables.hosts[1].addresses)
    assert await first.ask(contact, Message(Kind.FIND_NODE, KEY)) is None
    assert await home.find("r", 1.0) is not None
    for _ in range(3):
        await first.ask(contact, Message(Kind.FIND_NODE, KEY))
    assert peer not in first.table
    tables.unreached.clear()
    assert await first.ask(contact, Message(Kind.FIND_NODE, KEY)) is not None


async def test_a_peer_that_nobody_is_connected_to_enters_no_table(autojump_clock: object, tables: Tables):
    await tables.add()
    stream = await tables.stream(77)
    nowhere = Contact(FakeHost(FakeNetwork(), 99, tables.nursery, LIMITS).peer_id, ("/ip4/9.9.9.9/tcp/1",))
    await ask(stream, Message(Kind.ADD_PROVIDER, KEY, providers=(nowhere,)))
    liar = FakeHost(tables.network, 88, tables.nursery, LIMITS)

    async def lie(stream: PipeEnd, peer: PeerId, prefix: str) -> None:
        messages = MessageStream(stream, peer, LIMITS.kademlia_message_bytes)
        while (question := await messages.receive(5.0)) is not None:
            await messages.send(replace(question, closer=(nowhere,)), 1.0)

    liar.handle_bytes(PROTOCOL, lie)
    other = await tables.add()
    await other.ask(Contact(liar.peer_id, liar.addresses), Message(Kind.FIND_NODE, KEY))
    await other.provide("r")
    assert nowhere.peer not in other.table
    assert {contact.peer for contact in other.table.nearest(KEY)} == {tables.hosts[0].peer_id, liar.peer_id}


@pytest.mark.parametrize("kind", [Kind.PUT_VALUE, Kind.GET_VALUE])
async def test_values_are_refused_and_a_fault(autojump_clock: object, tables: Tables, kind: Kind):
    await tables.add()
    stream = await tables.stream(77)
    with pytest.raises(PeerGone):
        await ask(stream, Message(kind, b"/pk/x"))
    assert [fault for _, fault in tables.hosts[0].faults.counts()] == ["RemoteProtocolError"]


async def test_a_long_message_is_refused_at_its_length(autojump_clock: object, tables: Tables):
    await tables.add()
    stream = await tables.stream(77)
    await stream.send_all(encode_varint(LIMITS.kademlia_message_bytes + 1))
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    assert trio.current_time() < 0.2
    assert [fault for _, fault in tables.hosts[0].faults.counts()] == ["FrameError"]


@pytest.mark.parametrize("drip", [False, True])
async def test_a_stream_without_a_whole_question_ends_at_its_deadline(
    autojump_clock: object, tables: Tables, drip: bool
):
    await tables.add()
    stream = await tables.stream(77)
    began = trio.current_time()
    await stream.send_all(b"\x7f")
    for _ in range(9 if drip else 0):
        await stream.send_all(b"x")
        await trio.sleep(1.0)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    assert trio.current_time() - began <= LIMITS.libp2p_stream_seconds + 1.1
    assert [fault for _, fault in tables.hosts[0].faults.counts()] == ["SlowPeer"]


async def test_one_peer_s_idle_streams_leave_places_for_the_others(autojump_clock: object, tables: Tables):
    await tables.add()
    host, other = FakeHost(tables.network, 77, tables.nursery, LIMITS), tables.hosts[0]
    for _ in range(LIMITS.max_libp2p_streams):
        await host.open_bytes(other.peer_id, other.addresses, PROTOCOL, seconds=1)
    await trio.sleep(0.1)
    answer = await ask(await tables.stream(78), Message(Kind.FIND_NODE, KEY))
    assert answer == Message(Kind.FIND_NODE, KEY)


async def test_a_peer_provides_for_itself_alone_and_for_keys_of_our_kind(
    autojump_clock: object, tables: Tables
):
    table, stream = await tables.add(), await tables.stream(77)
    stranger, other = tables.network.hosts[_id(77)], tables.hosts[0]
    forged = Contact(other.peer_id, ("/ip4/9.9.9.9/tcp/1",))
    await ask(stream, Message(Kind.ADD_PROVIDER, KEY, providers=(forged,)))
    assert table.providers.size == 0
    own = Contact(stranger.peer_id, ("/ip4/9.9.9.9/tcp/1",))
    answer = await ask(stream, Message(Kind.ADD_PROVIDER, KEY, providers=(own,)))
    assert answer == Message(Kind.ADD_PROVIDER, KEY)
    # its own record says where it is, whatever the entry says
    assert table.providers.of(KEY, trio.current_time(), random.Random(1)) == [
        Contact(stranger.peer_id, stranger.addresses)
    ]
    with pytest.raises(PeerGone):
        await ask(stream, Message(Kind.ADD_PROVIDER, b"/ipfs/key", providers=(own,)))


async def test_the_limits_of_the_table_are_those_of_the_node(autojump_clock: object, tables: Tables):
    limits = replace(
        LIMITS, max_providers=6, max_providers_per_key=4, max_providers_per_network=2,
        max_provider_keys_per_peer=3, provider_life_seconds=50.0, max_table_peers_per_network=4,
    )  # fmt: skip
    table = await tables.add(limits=limits)

    def add(number: int, network: int, key: int = 0) -> None:
        peer = _id(4000 + number)
        contact = Contact(peer, (f"/ip4/9.9.{network}.{number}/tcp/1",))
        question = Message(Kind.ADD_PROVIDER, provider_key("public", str(key)), providers=(contact,))
        table._answer(question, peer, f"9.9.{network}.{number}/32")

    def held(key: int) -> int:
        return len(
            table.providers.of(provider_key("public", str(key)), trio.current_time(), random.Random(1))
        )

    for number in range(4):
        add(number, network=1)
    assert held(0) == limits.max_providers_per_network
    for number in range(4, 10):
        add(number, network=number)
    assert held(0) == limits.max_providers_per_key
    for key in range(1, 6):
        add(20, network=20, key=key)
    assert sum(map(held, range(1, 6))) == limits.max_provider_keys_per_peer
    assert table.providers.size == limits.max_providers
    await trio.sleep(limits.provider_life_seconds + 1.0)
    assert held(0) == 0
    for number in range(30):
        contact = Contact(_id(6000 + number), (f"/ip4/9.9.1.{number}/tcp/1",))
        table.table.answered(contact, trio.current_time())
    assert 0 < len(table.table) <= limits.max_table_peers_per_network


def _id(number: int) -> PeerId:
    return FakeHost(FakeNetwork(), number, None, LIMITS).peer_id


async def test_a_stranger_from_afar_names_no_address_of_a_private_network(
    autojump_clock: object, tables: Tables
):
    table = await tables.add()
    peer = _id(4000)  # without a record
    inner = Contact(peer, ("/ip4/10.0.0.5/tcp/22", "/ip4/127.0.0.1/tcp/6379"))
    both = Contact(peer, (*inner.addresses, "/ip4/8.8.8.8/tcp/4001"))
    for prefix, contact, kept in (
        ("8.8.8.8/32", inner, None),
        ("8.8.8.8/32", both, ("/ip4/8.8.8.8/tcp/4001",)),
        ("10.0.0.7/32", both, both.addresses),
    ):
        table._answer(Message(Kind.ADD_PROVIDER, KEY, providers=(contact,)), peer, prefix)
        found = table.providers.of(KEY, trio.current_time(), random.Random(1))
        assert [each.addresses for each in found] == ([] if kept is None else [kept])


async def test_a_silent_peer_costs_its_deadline_and_is_no_contact(autojump_clock: object, tables: Tables):
    table = await tables.add()
    silent = FakeHost(tables.network, 88, tables.nursery, LIMITS)

    async def say_nothing(stream: PipeEnd, peer: PeerId, prefix: str) -> None:
        await trio.sleep_forever()

    silent.handle_bytes(PROTOCOL, say_nothing)
    began = trio.current_time()
    contact = Contact(silent.peer_id, silent.addresses)
    table.table.answered(contact, began)
    assert await table.ask(contact, Message(Kind.FIND_NODE, KEY)) is None
    assert trio.current_time() - began == pytest.approx(ASK_SECONDS)
    assert silent.peer_id not in table.table


async def test_questions_beyond_the_budget_are_answered_more_slowly(autojump_clock: object, tables: Tables):
    limits = replace(LIMITS, kademlia_questions_per_peer_per_second=2.0, kademlia_questions_per_peer_burst=5)
    await tables.add(limits=limits)
    stream = await tables.stream(77)
    began = trio.current_time()
    for _ in range(15):
        await ask(stream, Message(Kind.PING), 5.0)
    assert trio.current_time() - began >= 5.0


async def test_servers_that_our_own_ways_in_name_come_before_a_liar_s(
    autojump_clock: object, tables: Tables, monkeypatch: pytest.MonkeyPatch
):
    first = await tables.add()
    honest = await tables.add()
    await honest.provide("r")
    liar = FakeHost(tables.network, 88, tables.nursery, LIMITS)
    made_up = tuple(Contact(_id(5000 + n), (f"/ip4/9.9.{n}.9/tcp/1",)) for n in range(20))

    async def lie(stream: PipeEnd, peer: PeerId, prefix: str) -> None:
        messages = MessageStream(stream, peer, LIMITS.kademlia_message_bytes)
        while (question := await messages.receive(5.0)) is not None:
            await messages.send(Message(question.kind, question.key, made_up, made_up), 5.0)

    liar.handle_bytes(PROTOCOL, lie)
    first.table.answered(Contact(liar.peer_id, liar.addresses), trio.current_time())
    client = await tables.add(serves=False)
    found = list(await client.find("r", 5.0))
    assert found[0] == tables.hosts[1].peer_id
    assert {contact.peer for contact in made_up} < set(found)


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"\x05abc", FrameError), (b"\x02\x08\x09", MessageError), (b"", None)],
)
async def test_a_stream_that_ends_early_or_holds_nonsense_is_a_fault(
    data: bytes, error: type[Exception] | None
):
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(data)
    await theirs.send_eof()
    messages = MessageStream(ours, PeerId("p"), 100)  # type: ignore[arg-type]  # reads alone
    if error is None:
        assert await messages.receive(1.0) is None
    else:
        with pytest.raises(error):
            await messages.receive(1.0)


async def test_a_peer_that_takes_no_answer_is_slow(autojump_clock: object):
    ours, _ = trio.testing.lockstep_stream_pair()
    messages = MessageStream(ours, PeerId("p"), 100)  # type: ignore[arg-type]  # writes alone
    with pytest.raises(SlowPeer):
        await messages.send(Message(Kind.PING), 3.0)
    assert trio.current_time() == pytest.approx(3.0)


# --- py-libp2p at the other end -------------------------------------------------------------------


@asynccontextmanager
async def real_host() -> AsyncIterator[Host]:
    identity = load_or_create_identity(None)
    async with open_host(identity=identity, listen=["/ip4/127.0.0.1/tcp/0"]) as host:
        yield host


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(5.0):
        while not await condition():  # noqa: ASYNC110  of another library's
            await trio.sleep(0.05)


async def test_the_table_and_py_libp2p_s_own_find_providers_for_each_other():
    async with real_host() as ours, real_host() as theirs:
        knowledge = Knowledge("public", {theirs.peer_id: theirs.addresses})
        dht = KadDHT(theirs.raw, DHTMode.SERVER)
        async with (
            background_trio_service(dht),
            open_kademlia(ours, knowledge, LIMITS, random.Random(1), serves=True) as table,
        ):
            await ours.connect(theirs.peer_id, theirs.addresses, seconds=2.0)
            await table.provide("r")
            assert [str(each.peer_id) for each in dht.provider_store.get_providers(KEY)] == [ours.peer_id]
            me = ID.from_base58(ours.peer_id)
            theirs.raw.get_peerstore().add_addrs(me, [Multiaddr(ours.addresses[0])], 600)
            assert await dht.provider_store._send_add_provider(me, KEY)

            async def taken() -> bool:
                return theirs.peer_id in await table.find("r", 1.0)

            await eventually(taken)
            found, _ = await dht.provider_store._get_providers_from_peer_with_closers(me, KEY)
            assert {each.peer_id.to_base58() for each in found} == {ours.peer_id, theirs.peer_id}
            await dht.peer_routing._query_peer_for_closest(me, KEY)


@asynccontextmanager
async def beside_py_libp2p() -> AsyncIterator[tuple[Kademlia, Host, KadDHT, Host]]:
    """Our table and py-libp2p's, each on a host of its own; the two hosts are connected."""
    async with real_host() as ours, real_host() as theirs:
        dht = KadDHT(theirs.raw, DHTMode.SERVER)
        async with (
            background_trio_service(dht),
            open_kademlia(ours, Knowledge("public"), LIMITS, random.Random(1), serves=True) as table,
        ):
            await ours.connect(theirs.peer_id, theirs.addresses, seconds=2.0)
            yield table, ours, dht, theirs


async def test_find_node_is_answered_by_the_one_table_with_the_contacts_of_the_other():
    known = [Contact(_id(n), (f"/ip4/127.0.0.1/tcp/{n}", f"/ip6/fd00::{n}/tcp/1")) for n in range(4001, 4004)]
    async with beside_py_libp2p() as (table, ours, dht, theirs):
        for contact in known:
            peer, where = ID.from_base58(contact.peer), [Multiaddr(text) for text in contact.addresses]
            theirs.raw.get_peerstore().add_addrs(peer, where, 600)
            assert await dht.routing_table.add_peer(peer, skip_server_mode_check=True)
        way_in = Contact(theirs.peer_id, theirs.addresses)
        answer = await table.ask(way_in, Message(Kind.FIND_NODE, KEY))
        assert answer is not None
        assert {each.peer: set(each.addresses) for each in answer.closer} == {
            each.peer: set(each.addresses) for each in known
        }
        assert theirs.peer_id in table.table

        one = Contact(_id(5000), ("/ip4/127.0.0.1/tcp/5000",))
        table.table.answered(one, trio.current_time())
        found = await dht.peer_routing._query_peer_for_closest(ID.from_base58(ours.peer_id), KEY)
        assert [each.to_base58() for each in found] == [one.peer]
        assert [str(each) for each in theirs.raw.get_peerstore().addrs(found[0])] == list(one.addresses)


async def raw_question(
    host: Host, peer: PeerId, addresses: tuple[str, ...], question: Libp2pMessage
) -> bytes:
    """The bytes of the answer to a question in py-libp2p's own encoding."""
    stream = await host.open_bytes(peer, addresses, PROTOCOL, seconds=2.0)
    data = question.SerializeToString()
    await stream.send_all(encode_varint(len(data)) + data)
    answer = bytearray()
    with trio.fail_after(5.0):
        while (
            not answer or len(answer) < 1 + answer[0]
        ):  # py-libp2p may send the length alone; it is one byte
            part = await stream.receive_some(LIMITS.kademlia_message_bytes)
            if not part:
                break
            answer += part
    stream.reset_now()
    return bytes(answer)


async def test_a_ping_in_libp2p_s_bytes_comes_back_from_either_table():
    ping = Libp2pMessage(type=Libp2pMessage.PING)
    whole = encode_varint(len(ping.SerializeToString())) + ping.SerializeToString()
    async with beside_py_libp2p() as (table, ours, _, theirs):
        assert await raw_question(theirs, ours.peer_id, ours.addresses, ping) == whole
        assert await raw_question(ours, theirs.peer_id, theirs.addresses, ping) == whole
        assert await table.ask(Contact(theirs.peer_id, theirs.addresses), Message(Kind.PING)) == Message(
            Kind.PING
        )


async def test_a_value_that_py_libp2p_s_table_would_keep_is_refused():
    async with beside_py_libp2p() as (_, ours, dht, theirs):
        key = f"/pk/{theirs.peer_id}".encode()
        assert not await dht.value_store._store_at_peer(ID.from_base58(ours.peer_id), key, b"value")
        value = Libp2pMessage(type=Libp2pMessage.PUT_VALUE, key=key)
        value.record.key, value.record.value = key, b"value"
        with pytest.raises((PeerGone, trio.BrokenResourceError)):
            await raw_question(theirs, ours.peer_id, ours.addresses, value)
        assert "RemoteProtocolError" in {fault for _, fault in ours.faults.counts()}


def test_a_question_is_small():
    assert len(encode(Message(Kind.GET_PROVIDERS, KEY))) == 38
