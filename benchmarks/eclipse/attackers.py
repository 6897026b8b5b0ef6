"""Attackers on the directory of a swarm: ids near a key, in few or many networks, that know each other alone.

Each announces itself, enters the Kademlia tables of honest nodes, and says that it serves the model.  Asked
for records or for peers it lies (names attackers alone), is slow (the same, just before it is given up), or
is silent.  In a crowd each also tells its neighbours of servers that are not there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import trio

from benchmarks.eclipse.machines import SERVER, Host, Scene, identity_named, numbered_address
from node.network.directory.kademlia.contact import NEAREST, distance
from node.network.directory.kademlia.kademlia import ASK_SECONDS, provider_key
from node.network.directory.kademlia.kademlia import PROTOCOL as KADEMLIA
from node.network.directory.kademlia.messages import Kind, Message
from node.network.directory.kademlia.stream import MessageStream
from node.network.directory.neighbours import PROTOCOL as RECORDS
from node.network.streams import FramedStream
from node.network.transport.identity import Identity
from routing.names import PeerId, peer_id_bytes
from routing.view.exchange import encode_digest, encode_records
from routing.view.records import sign_record
from routing.view.view import Arrival
from tensor_codec.errors import PeerFault
from tests.fakes_network import PipeEnd

POOL = 2048  # ids out of which those near a key are chosen
VICTIMS = 2  # honest nodes whose table an attacker enters
START_SECONDS = 10.0  # within which all of them begin
KNOWN_SECONDS = 2.0  # until an attacker's record is known
RENEW_SECONDS = 60.0  # between attackers' own records
NEIGHBOURS = 64  # attackers at most that exchange records with honest servers; they tell of all others too
BEFORE_GIVEN_UP_SECONDS = ASK_SECONDS - 0.2
AGAIN_SECONDS = 5.0
SEND_SECONDS = 60.0
NAMED = 30  # further attackers of which one tells a peer that asks
CROWD, CROWD_AT_NEWCOMERS = 10, 100  # made-up servers that an attacker tells an honest server and a newcomer
MADE_UP = 2000


class Attack:
    """All attackers of a scene.  near: keys and ids near which half of them stand."""

    def __init__(self, scene: Scene, near: Sequence[bytes]) -> None:
        self._scene = scene
        self._key = provider_key("public", scene.revision)
        case = scene.case
        self.hosts = [
            Host(scene, identity, numbered_address(9, number % case.prefixes, number // case.prefixes + 1))
            for number, identity in enumerate(_ids(case.ids, near, scene.rng))
        ]
        contacts = [host.contact for host in self.hosts]
        self._nearest = sorted(contacts, key=lambda each: distance(each.peer, self._key))[:NEAREST]
        self._arrivals: dict[PeerId, Arrival] = {}
        self._seq = 0
        told_by = min(NEIGHBOURS, len(self.hosts))
        self._groups = [self.hosts[number::told_by] for number in range(told_by)]

    def start(self) -> None:
        """Begin, until the end of the simulation."""
        self._announce()
        nursery = self._scene.nursery
        nursery.start_soon(self._renew)
        for host in self.hosts:
            host.handle(RECORDS, self._serve_records)
            host.handle_bytes(KADEMLIA, self._serve_kademlia)
            nursery.start_soon(self._act, host)
        for group in self._groups:
            nursery.start_soon(self._be_neighbour, group, self._scene.rng.choice(self._scene.honest))

    # --- asked ---

    async def _serve_kademlia(self, stream: PipeEnd, peer: PeerId, prefix: str) -> None:
        means = self._scene.case.means
        if means == "silent":
            await trio.sleep_forever()
        messages = MessageStream(stream, peer, self._scene.limits.kademlia_message_bytes)
        while (question := await messages.receive(SEND_SECONDS)) is not None:
            if means == "slow":
                await trio.sleep(BEFORE_GIVEN_UP_SECONDS)
            answer = Message(question.kind, question.key, tuple(self._nearest))
            if question.key != self._key:
                answer = replace(answer, closer=tuple(host.contact for host in self._some(NEAREST)))
            if question.kind is Kind.GET_PROVIDERS:
                answer = replace(answer, providers=tuple(host.contact for host in self._some(NEAREST)))
            await messages.send(answer, SEND_SECONDS)

    async def _serve_records(self, stream: FramedStream) -> None:
        means = self._scene.case.means
        if means == "silent":
            await trio.sleep_forever()
        if means == "slow":
            await trio.sleep(BEFORE_GIVEN_UP_SECONDS)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_all, stream)
                await self._say(stream, self._known())
                for frame in encode_digest({}, ask=False):
                    await stream.send(frame)
                await self._say(stream, self._crowd(stream.peer, CROWD_AT_NEWCOMERS))
                while True:
                    await trio.sleep(RENEW_SECONDS)
                    await self._say(stream, self._known())
        except* PeerFault:
            pass

    def _known(self) -> list[Arrival]:
        return [self._arrivals[host.peer_id] for host in self._some(NAMED)]

    def _some(self, most: int) -> list[Host]:
        return self._scene.rng.sample(self.hosts, min(most, len(self.hosts)))

    def _crowd(self, name: PeerId, most: int) -> list[Arrival]:
        if self._scene.case.means != "crowd":
            return []
        numbers = random.Random(f"{name} {len(self._arrivals)}").sample(range(MADE_UP), most)
        return [_made_up(number, self._scene.revision) for number in numbers]

    async def _say(self, stream: FramedStream, arrivals: Sequence[Arrival]) -> None:
        for frame in encode_records(arrivals):
            await stream.send(frame, SEND_SECONDS)

    # --- acting ---

    async def _act(self, host: Host) -> None:
        """Enter the tables of some honest servers."""
        scene = self._scene
        await trio.sleep(KNOWN_SECONDS + scene.rng.uniform(0.0, START_SECONDS))
        victims = scene.rng.sample(scene.honest, min(VICTIMS, len(scene.honest)))
        provide = Message(Kind.ADD_PROVIDER, self._key, providers=(host.contact,))
        for victim in victims:
            for question in (provide, Message(Kind.FIND_NODE, self._key)):
                await self._ask(host, victim, question)

    async def _ask(self, host: Host, victim: Host, question: Message) -> None:
        try:
            stream = await host.open_bytes(victim.peer_id, victim.addresses, KADEMLIA, seconds=SEND_SECONDS)
            messages = MessageStream(stream, victim.peer_id, self._scene.limits.kademlia_message_bytes)
            await messages.send(question, SEND_SECONDS)
            await messages.receive(SEND_SECONDS)
            await stream.aclose()
        except PeerFault:
            return

    async def _be_neighbour(self, group: Sequence[Host], victim: Host) -> None:
        """The first one tells an honest server of all of them."""
        host = group[0]
        while True:
            try:
                stream = await host.open_stream(
                    victim.peer_id, victim.addresses, RECORDS, seconds=SEND_SECONDS
                )
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_read_all, stream)
                    await self._say(stream, self._crowd(host.peer_id, CROWD))
                    while True:
                        await self._say(stream, [self._arrivals[each.peer_id] for each in group])
                        await trio.sleep(RENEW_SECONDS)
            except* PeerFault:
                pass
            await trio.sleep(AGAIN_SECONDS)

    async def _renew(self) -> None:
        while True:
            await trio.sleep(RENEW_SECONDS - KNOWN_SECONDS)
            self._announce()

    def _announce(self) -> None:
        self._seq += 1
        for host in self.hosts:
            record = replace(
                SERVER,
                revision=self._scene.revision,
                peer=host.peer_id,
                addresses=host.addresses,
                seq=self._seq,
            )
            self._arrivals[host.peer_id] = Arrival(record, sign_record(record, host.identity.private_key))


async def _read_all(stream: FramedStream) -> None:
    while await stream.receive() is not None:
        pass


def _ids(count: int, near: Sequence[bytes], rng: random.Random) -> list[Identity]:
    """Half of them are the nearest of a pool to some key, the others stand anywhere."""
    pool = list(_pool())
    rng.shuffle(pool)
    chosen: dict[str, Identity] = {}
    for key in near:
        nearest = sorted(pool, key=lambda each: distance(each.peer_id, key))
        chosen.update({each.peer_id: each for each in nearest[: max(1, count // 2 // len(near))]})
    chosen.update({each.peer_id: each for each in pool[: max(0, count - len(chosen))]})
    found = list(chosen.values())[:count]
    return rng.sample(found, len(found))


@lru_cache(maxsize=1)
def _pool() -> tuple[Identity, ...]:
    return tuple(identity_named(f"attacker {number}") for number in range(POOL))


@lru_cache(maxsize=2 * MADE_UP)
def _made_up(number: int, revision: str) -> Arrival:
    identity = identity_named(f"nobody {number}")
    addresses = (f"/ip4/{numbered_address(20, number)}/tcp/4001",)
    record = replace(SERVER, revision=revision, peer=identity.peer_id, addresses=addresses, seq=1)
    return Arrival(record, sign_record(record, identity.private_key))


def near_to(newcomers: Sequence[Identity], key: bytes) -> list[bytes]:
    """The places in the key space that attackers want: the model's key, and the ids of newcomers."""
    return [key, *(peer_id_bytes(each.peer_id) for each in newcomers)]
