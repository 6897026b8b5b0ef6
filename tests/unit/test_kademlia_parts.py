"""The parts of the Kademlia table without I/O: messages, contacts, provider entries, lookups."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.kad_dht.pb.kademlia_pb2 import Message as Libp2pMessage
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from node.network.directory.kademlia.contact import NEAREST, Contact, distance
from node.network.directory.kademlia.lookup import MOST_ASKED, Lookup
from node.network.directory.kademlia.messages import Kind, Message, decode, encode, encode_varint, read_varint
from node.network.directory.kademlia.providers import Providers
from node.network.directory.kademlia.table import OLD_SECONDS, Table
from routing.names import PeerId, peer_id_bytes, peer_id_from_bytes, peer_id_of
from tensor_codec.errors import MessageError

KEY = bytes([0x12, 0x20]) + bytes(32)
ADDRESSES = ("/ip4/8.8.4.4/tcp/4001", "/ip6/2a00:1450::1/tcp/1", "/dns4/node.example/tcp/65535")


def peer(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


def at(number: int, network: str = "") -> Contact:
    """A contact; network: the first three numbers of its address, by default one of its own."""
    where = network or f"9.{number // 250 % 250}.{number % 250}"
    return Contact(peer(number), (f"/ip4/{where}.1/tcp/4001",))


# --- messages -------------------------------------------------------------------------------------


def test_messages_are_those_of_libp2p():
    message = Message(Kind.GET_PROVIDERS, KEY, (Contact(peer(1), ADDRESSES),), (Contact(peer(2)),))
    theirs = Libp2pMessage()
    theirs.ParseFromString(encode(message))
    assert (theirs.type, theirs.key) == (Libp2pMessage.GET_PROVIDERS, KEY)
    assert [ID(each.id).to_base58() for each in theirs.closerPeers] == [peer(1)]
    assert [str(Multiaddr(each)) for each in theirs.closerPeers[0].addrs] == list(ADDRESSES)
    assert [ID(each.id).to_base58() for each in theirs.providerPeers] == [peer(2)]
    assert decode(theirs.SerializeToString()) == message


def test_of_libp2p_s_messages_the_rest_is_passed_over():
    theirs = Libp2pMessage(type=Libp2pMessage.FIND_NODE, key=b"k", clusterLevelRaw=7, senderRecord=b"x" * 99)
    theirs.record.value = b"value"
    one = theirs.closerPeers.add(id=peer_id_bytes(peer(1)), connection=1, signedRecord=b"y" * 50)
    for text in (*ADDRESSES, "/ip4/1.2.3.4/udp/9/quic-v1", "/ip4/8.8.8.8/tcp/9/ws", "/ip4/0.0.0.0/tcp/1"):
        one.addrs.append(Multiaddr(text).to_bytes())
    one.addrs.append(Multiaddr(f"/ip4/8.8.8.8/tcp/9/p2p/{peer(1)}").to_bytes())
    one.addrs.append(b"\x35\xff")
    theirs.closerPeers.add(id=b"\x12\x20" + bytes(32))  # an RSA key's id
    theirs.closerPeers.add(id=b"")
    assert decode(theirs.SerializeToString()) == Message(
        Kind.FIND_NODE, b"k", (Contact(peer(1), (*ADDRESSES, "/ip4/8.8.8.8/tcp/9")),)
    )


def test_no_answer_names_more_than_twenty_peers_or_eight_addresses_of_one():
    theirs = Libp2pMessage(type=Libp2pMessage.FIND_NODE)
    for number in range(60):
        one = theirs.closerPeers.add(id=peer_id_bytes(peer(number)))
        one.addrs.extend(Multiaddr(f"/ip4/8.8.8.8/tcp/{port}").to_bytes() for port in range(1, 30))
    found = decode(theirs.SerializeToString())
    assert len(found.closer) == NEAREST
    assert {len(contact.addresses) for contact in found.closer} == {8}


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\x06",  # an unknown kind
        b"\x08",
        b"\x12\x51" + bytes(81),  # a long key
        b"\x12\x05abc",
        b"\x0b",  # a group
        b"\xff" * 11,
        b"\x42\x03\x0a\x09a",  # a field beyond its message
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes):
    with pytest.raises(MessageError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_nothing_but_a_message_error_comes_of_any_bytes(data: bytes):
    with suppress(MessageError):
        decode(data)


@given(st.integers(0, 2**63))
def test_a_varint_comes_back(number: int):
    data = encode_varint(number)
    assert read_varint(data, 0) == (number, len(data))
    assert read_varint(data[:-1], 0) is None


def test_a_peer_id_in_bytes_comes_back_and_another_kind_of_key_is_refused():
    assert peer_id_from_bytes(peer_id_bytes(peer(3))) == peer(3)
    assert ID.from_base58(peer(3)).to_bytes() == peer_id_bytes(peer(3))
    for raw in (b"", b"\x12\x20" + bytes(32), peer_id_bytes(peer(3)) + b"\x00"):
        with pytest.raises(ValueError, match="bytes"):
            peer_id_from_bytes(raw)


# --- contacts -------------------------------------------------------------------------------------


def test_the_nearest_contacts_are_the_nearest():
    table = Table(peer(0), 1000)
    kept = [number for number in range(1, 200) if table.answered(at(number), 0.0)]
    assert len(table) == len(kept) > 2 * NEAREST
    nearest = sorted(map(peer, kept), key=lambda each: distance(each, KEY))[:NEAREST]
    assert [contact.peer for contact in table.nearest(KEY)] == nearest


def test_a_bucket_keeps_contacts_that_answer_and_gives_the_place_of_an_old_one():
    table = Table(peer(0), 1000)
    far = [n for n in range(1, 200) if table._bucket(peer(n)) == 0]
    assert all(table.answered(at(number), 0.0) for number in far[:NEAREST])
    newcomer = at(far[NEAREST])
    assert not table.answered(newcomer, OLD_SECONDS - 1.0)
    for number in far[1:NEAREST]:
        table.answered(at(number), OLD_SECONDS - 1.0)
    assert table.answered(newcomer, OLD_SECONDS)
    assert peer(far[0]) not in table
    assert newcomer.peer in table


def test_a_contact_that_gives_no_answer_is_one_no_more():
    table = Table(peer(0), 1000)
    table.answered(at(1), 0.0)
    table.failed(peer(1))
    table.failed(peer(0))
    table.failed(peer(2))
    assert len(table) == 0


def test_neither_this_node_nor_a_peer_without_an_address_is_a_contact():
    table = Table(peer(0), 1000)
    assert not table.answered(at(0), 0.0)
    assert not table.answered(Contact(peer(1)), 0.0)
    assert peer(0) not in table


def test_a_public_network_has_few_places_and_a_private_one_any():
    table = Table(peer(0), 8)
    sybils = [at(number, "9.9.9") for number in range(1, 300)]
    for sybil in sybils:
        table.answered(sybil, 0.0)
    assert 2 <= len(table) <= 8
    for number in range(300, 600):
        table.answered(at(number, "192.168.1"), 0.0)
    assert len(table) > 3 * NEAREST


# --- provider entries -----------------------------------------------------------------------------


def providers(**changes: object) -> Providers:
    settings: dict[str, object] = {
        "most": 100, "per_key": 10, "per_peer": 2, "per_network": 3, "life_seconds": 300.0
    }  # fmt: skip
    return Providers(**{**settings, **changes})  # type: ignore[arg-type]  # by their names


def named(entries: Providers, key: bytes = KEY, now: float = 0.0) -> set[PeerId]:
    return {contact.peer for contact in entries.of(key, now, random.Random(1))}


def test_an_entry_is_named_for_its_life_and_longer_if_it_is_renewed():
    entries = providers()
    entries.add(KEY, at(1), 0.0)
    entries.add(KEY, at(2), 0.0)
    entries.add(KEY, at(1), 200.0)
    assert named(entries, now=299.0) == {peer(1), peer(2)}
    assert named(entries, now=301.0) == {peer(1)}
    assert named(entries, now=502.0) == set()
    assert entries.size == 0


def test_a_key_a_peer_a_network_and_the_whole_are_bounded():
    entries = providers()
    assert [entries.add(KEY, at(n, "9.9.9"), 0.0) for n in range(5)] == [True] * 3 + [False] * 2
    assert sum(entries.add(KEY, at(n), 0.0) for n in range(10, 30)) == 9  # two took places of the crowd
    assert len(named(entries)) == 10
    assert [entries.add(bytes([n]), at(100), 0.0) for n in range(3)] == [True, True, False]
    for number in range(1000):
        entries.add(number.to_bytes(2, "big"), at(200 + number), 0.0)
    assert entries.size <= 100


def test_peers_that_are_known_from_elsewhere_find_a_place_in_a_full_key_and_are_named_first():
    known = {peer(1000), peer(1001)}
    entries = providers(per_key=64, is_known=known.__contains__)
    for number in range(100):
        entries.add(KEY, at(number, "127.0.0"), 0.0)
    assert len(entries._keys[KEY]) == 64
    assert not entries.add(KEY, at(500, "127.0.0"), 1.0)
    assert entries.add(KEY, at(1000, "127.0.0"), 1.0)
    assert entries.add(KEY, at(1001, "127.0.0"), 1.0)
    assert known <= named(entries)


# --- lookups --------------------------------------------------------------------------------------


def walk(lookup: Lookup, hints: dict[PeerId, list[Contact]]) -> list[list[PeerId]]:
    """Ask until the end; the peers that each path asked."""
    asked: list[list[PeerId]] = [[] for _ in range(lookup.paths)]
    while True:
        batch = [(n, each) for n in range(lookup.paths) if (each := lookup.next(n)) is not None]
        if not batch:
            return asked
        for number, contact in batch:
            asked[number].append(contact.peer)
            if contact.peer in hints:
                lookup.answered(number, contact, hints[contact.peer])


def test_no_peer_is_asked_by_two_paths_or_twice_and_this_node_by_none():
    everybody = [at(number) for number in range(40)]
    hints = {contact.peer: everybody for contact in everybody}
    asked = walk(Lookup(peer(0), KEY, everybody[1:4], everybody[4:8]), hints)
    flat = [each for path in asked for each in path]
    assert len(flat) == len(set(flat)) > 15
    assert peer(0) not in flat
    assert [path[0] for path in asked] == [peer(1), peer(2), peer(3)]


def test_a_path_follows_the_nearest_hints_and_stops_after_some():
    honest, liars = [at(number) for number in range(1, 4)], [at(number) for number in range(100, 400)]
    hints = {honest[0].peer: liars[:20], **{liar.peer: liars for liar in liars}}
    asked = walk(Lookup(peer(0), KEY, honest), hints)
    assert [len(path) for path in asked] == [MOST_ASKED, 1, 1]
    assert asked[0][1] == min((liar.peer for liar in liars[:20]), key=lambda each: distance(each, KEY))


def test_an_answer_that_names_one_public_network_is_followed_twice():
    first = at(1)
    lookup = Lookup(peer(0), KEY, [first], paths=1)
    asked = walk(lookup, {first.peer: [at(number, "9.9.9") for number in range(100, 120)]})
    assert len(asked[0]) == 1 + 2
    assert [contact.peer for contact in lookup.heard] == [first.peer]


def test_a_path_asks_two_peers_of_a_public_network_whoever_names_them():
    first, crowd = at(1), [at(number, "9.9.9") for number in range(100, 140)]
    honest = [at(number) for number in range(200, 204)]
    hints = {each.peer: [*crowd[10:30], *honest] for each in crowd}
    lookup = Lookup(peer(0), KEY, [first], paths=1)
    asked = walk(lookup, {first.peer: crowd[:20], **hints})[0]
    assert sum(contact.peer in asked for contact in crowd) == 2
    assert len(asked) == 3


def test_hints_without_an_address_are_not_followed():
    first = at(1)
    assert walk(Lookup(peer(0), KEY, [first], paths=1), {first.peer: [Contact(peer(5))]}) == [[first.peer]]
