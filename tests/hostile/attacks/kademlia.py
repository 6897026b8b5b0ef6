"""Attacks on the Kademlia table: values that fill memory, streams that hold it up, answers that mislead."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from typing import Any

import trio
import varint
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID

from node.network.directory.kademlia.kademlia import provider_key
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import Identity
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.limits import KIB, MIB
from tests.hostile.means import connection_to, stream_of
from tests.hostile.stage import Stage, new_identity, served_by

PROTOCOL = "/ipfs/kad/1.0.0"
PUTTERS, HELD, POISONERS = 4, 14, 8
VALUE = bytes(900 * KIB)
PROBE_SECONDS = 0.5
ANSWER_SECONDS = 2.0
MOST_ANSWER_BYTES = 4 * MIB


async def kademlia_put(stage: Stage) -> None:
    """Values of 900 KiB under keys that are valid, from 4 ids."""
    await stage.ready()

    async def put() -> None:
        async with connection_to(stage) as connection:
            while True:
                identity = new_identity()
                message = Message(type=Message.PUT_VALUE, key=value_key(identity))
                message.record.key = message.key
                message.record.value = public_key(identity)
                message.record.author = VALUE
                answer = await ask(connection, message)
                stage.got["values taken" if answer is not None else "values refused"] += 1
                if answer is None:
                    await trio.sleep(0.1)

    await stage.at_once(PUTTERS, put)


def none_taken(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values that the node took."""
    taken = got.get("values taken", 0)
    return [f"the node took {taken} values of strangers"] if taken else []


async def kademlia_hold(stage: Stage) -> None:
    """14 idle streams of one id; a stranger asks the table for something meanwhile."""
    await stage.ready()

    async def hold() -> None:
        async with connection_to(stage) as connection:
            for _ in range(HELD):
                await stream_of(connection, PROTOCOL).send_all(b"\x10")  # the length of a message
                stage.got["streams"] += 1
            await connection.closed.wait()
            raise PeerGone(connection.failure or "closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.again_and_again, hold)
        nursery.start_soon(probe_forever, stage, find_node())


async def kademlia_poison(stage: Stage) -> None:
    """Peers that are not there, near the key of the model's servers, and named as such."""
    info = await served_by(stage.target)
    key = provider_key("public", info.revision)
    await stage.ready()

    async def poison() -> None:
        identity = near(key)
        async with connection_to(stage, identity) as connection:
            message = Message(type=Message.ADD_PROVIDER, key=key)
            peer = message.providerPeers.add()
            peer.id = ID.from_base58(identity.peer_id).to_bytes()
            peer.addrs.append(b"\x04" + socket.inet_aton(stage.third) + b"\x06\x00\x07")  # TCP, port 7
            await ask(connection, message)
            stage.got["entries"] += 1
            for _ in range(5):
                await ask(connection, find_node(key))
                stage.got["questions"] += 1
            await trio.sleep(0.2)

    async with trio.open_nursery() as nursery:
        for _ in range(POISONERS):
            nursery.start_soon(stage.again_and_again, poison)
        nursery.start_soon(probe_forever, stage, Message(type=Message.GET_PROVIDERS, key=key))


def all_answered(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with the answers that a stranger got of the table."""
    asked, answered = got.get("probes", 0), got.get("probes answered", 0)
    if answered >= asked - 1:  # the last one may be cut off by the end
        return []
    return [f"of {asked} questions to the Kademlia table {answered} were answered"]


def servers_named(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with the providers that the table names."""
    found = all_answered(got)
    if got.get("probes", 0) and not got.get("probes with the true server", 0) >= got["probes"] - 2:
        found.append("the table named made-up servers in place of the true one")
    return found


async def probe_forever(stage: Stage, message: Message) -> None:
    """Ask the table as a stranger would, again and again."""
    true = [ID.from_base58(target.peer).to_bytes() for target in stage.targets[1:]]
    while True:
        stage.got["probes"] += 1
        try:
            prober = Stage(stage.targets, ("",), 0)  # from where honest peers come
            async with connection_to(prober) as connection:
                answer = await ask(connection, message)
            stage.got["probes answered"] += answer is not None
            if answer is not None and true:
                named = [peer.id for peer in answer.providerPeers]
                stage.got["probes with the true server"] += any(peer in named for peer in true)
        except (PeerFault, OSError) as error:
            stage.got[f"probe: {type(error).__name__}"] += 1
        await trio.sleep(PROBE_SECONDS)


async def ask(connection: Connection, message: Message) -> Message | None:
    """The answer, or None where there is none in time.  Raises PeerGone where the connection is gone."""
    stream = stream_of(connection, PROTOCOL)
    data = message.SerializeToString()
    try:
        with trio.move_on_after(ANSWER_SECONDS):
            await stream.send_all(varint.encode(len(data)) + data)
            return await read(stream)
    except PeerFault:
        connection.raise_if_closed()
        await trio.sleep(0.05)
    finally:
        await stream.aclose()
    return None


async def read(stream: MuxedStream) -> Message | None:
    """One message with its length before it."""
    data = b""
    while True:
        more = await stream.receive_some()
        if not more or len(data) > MOST_ANSWER_BYTES:
            return None
        data += more
        size = next((i for i, byte in enumerate(data) if byte < 0x80), None)
        if size is None:
            continue
        length = varint.decode_bytes(data[: size + 1])
        if len(data) >= size + 1 + length:
            answer = Message()
            answer.ParseFromString(data[size + 1 : size + 1 + length])
            return answer


def find_node(key: bytes = b"any") -> Message:
    """The cheapest question."""
    return Message(type=Message.FIND_NODE, key=key)


def value_key(identity: Identity) -> bytes:
    """The one kind of key that py-libp2p takes values for."""
    return b"/pk/" + ID.from_base58(identity.peer_id).to_bytes().hex().encode()


def public_key(identity: Identity) -> bytes:
    """A public key as libp2p writes it: Ed25519, 32 bytes."""
    return b"\x08\x01\x12\x20" + identity.public_key


def near(key: bytes) -> Identity:
    """Of some throw-away ids the nearest to a key."""
    where = hashlib.sha256(key).digest()

    def distance(identity: Identity) -> int:
        found = hashlib.sha256(ID.from_base58(identity.peer_id).to_bytes()).digest()
        return int.from_bytes(found, "big") ^ int.from_bytes(where, "big")

    return min((new_identity() for _ in range(64)), key=distance)
