"""Finds peers of a model in a Kademlia table, and holds a part of the table for others.

The table holds no records and no values: each peer sends its own record, with its signature.  The table only
names peers to ask, and nothing in it is believed.  Answered are the questions that Raceme's nodes ask
(`messages`); each costs a stranger a place among few streams, and leaves at most one small entry, bounded by
key, peer and network.  The messages are libp2p's, so py-libp2p's own table can take part.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Protocol

import trio

from node.network.addresses import Reach, parse_address, reach_of
from node.network.budgets.libp2p_streams import Libp2pStreams, ServedStream
from node.network.directory.kademlia.contact import NEAREST, Contact
from node.network.directory.kademlia.lookup import Lookup
from node.network.directory.kademlia.messages import Kind, Message
from node.network.directory.kademlia.providers import Providers
from node.network.directory.kademlia.stream import ByteStream, MessageStream
from node.network.directory.kademlia.table import Table
from node.network.directory.kademlia.walk import walk
from node.network.prefixes import is_local
from node.runtime.nurseries import background_nursery
from routing.names import PeerId
from routing.view.records import MAX_ADDRESSES
from tensor_codec.errors import PeerFault, PeerGone, RemoteProtocolError, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

PROTOCOL = "/ipfs/kad/1.0.0"
PROVIDE_SECONDS = 10.0
ASK_SECONDS = 2.0  # one question, a connection included: a silent peer holds up its path for so long
CONNECTED_ASKED = 6  # connected peers that a lookup starts from, besides our own ways in
TOLD_AT_ONCE = 4
MAX_MESSAGES = 64  # of one stream
STRANGERS_KEPT = 256  # peers without an answer to our own question, and those to be asked
_SHA256_MULTIHASH = bytes([0x12, 0x20])

log = logging.getLogger(__name__)
Handler = Callable[[ByteStream, PeerId, str], Awaitable[None]]


def provider_key(swarm: str, revision: str) -> bytes:
    """The key under which servers of a model revision are found: a SHA-256 multihash."""
    return _key("raceme-providers-1", swarm, revision)


def catalogue_key(swarm: str, revision: str) -> bytes:
    """The key under which peers are found that give cards of adapters for a model revision."""
    return _key("raceme-catalogue-1", swarm, revision)


def adapter_key(swarm: str, adapter: str) -> bytes:
    """The key under which peers are found that give the adapter of this id."""
    return _key("raceme-adapter-1", swarm, adapter)


def _key(domain: str, swarm: str, name: str) -> bytes:
    return _SHA256_MULTIHASH + hashlib.sha256("\0".join((domain, swarm, name)).encode()).digest()


class KademliaHost(Protocol):
    """The part of `node.network.host.Host` that a Kademlia table needs."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs at which this node can be dialled."""

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""

    def charge(self, who: str, fault: PeerFault) -> None:
        """Count a peer's fault."""

    def handle_bytes(self, protocol: str, handler: Handler) -> None:
        """Answer inbound streams of a protocol that has frames of its own.

        handler: gets the stream, its peer, and the prefix of the peer's address.
        """

    async def open_bytes(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> ByteStream:
        """A new stream, over the live connection to the peer or a new one.  Raises PeerFault."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a table needs to know of the swarm.

    swarm: its id.  ways_in: peers of our own configuration, asked first.  addresses: of a peer, by its signed
    record; empty where unknown.  own: the addresses at which others dial this node; None: all of the host's.
    is_dialled: whether others dial this node: else it only asks, as a client does.
    """

    swarm: str
    ways_in: Mapping[PeerId, tuple[str, ...]] = field(default_factory=dict)
    addresses: Callable[[PeerId], tuple[str, ...]] = lambda _: ()
    own: Callable[[], tuple[str, ...]] | None = None
    is_dialled: Callable[[], bool] = lambda: True


class Kademlia:
    """The Kademlia table of one host, for the directory.  See `open_kademlia`."""

    def __init__(self, host: KademliaHost, knowledge: Knowledge, limits: Limits, rng: random.Random) -> None:
        self._host = host
        self._knowledge = knowledge
        self._limits = limits
        self._rng = rng
        self.table = Table(host.peer_id, limits.max_table_peers_per_network)
        self.providers = Providers(
            limits.max_providers,
            limits.max_providers_per_key,
            limits.max_provider_keys_per_peer,
            limits.max_providers_per_network,
            limits.provider_life_seconds,
            is_known=lambda peer: bool(knowledge.addresses(peer)),
        )
        self._places = Libp2pStreams(limits)
        self._budgets: OrderedDict[PeerId, TokenBucket] = OrderedDict()
        self._strangers = trio.open_memory_channel[PeerId](STRANGERS_KEPT)
        self._asked: dict[PeerId, None] = {}  # strangers that were asked, or will be

    # --- our own questions ---

    async def provide(self, revision: str) -> None:
        """Write into the table that this node serves a model revision; takes 10 s at the most."""
        await self.provide_key(provider_key(self._knowledge.swarm, revision))

    async def provide_key(self, key: bytes) -> None:
        """Write into the table that this node provides a key; takes 10 s at the most."""
        addresses = self._host.addresses if self._knowledge.own is None else self._knowledge.own()
        own = Contact(self._host.peer_id, addresses[:MAX_ADDRESSES])
        if not own.addresses:
            return
        self.providers.add(key, own, trio.current_time())
        with trio.move_on_after(PROVIDE_SECONDS):
            lookup, _ = await self._look_up(key, Kind.FIND_NODE, PROVIDE_SECONDS / 2)
            told = {contact.peer: contact for contact in (*self._ways_in(), *lookup.heard[:NEAREST])}
            message = Message(Kind.ADD_PROVIDER, key, providers=(own,))
            turns = trio.CapacityLimiter(TOLD_AT_ONCE)

            async def tell(contact: Contact) -> None:
                async with turns:
                    await self.ask(contact, message)

            async with trio.open_nursery() as nursery:
                for contact in told.values():
                    nursery.start_soon(tell, contact)

    async def find(self, revision: str, seconds: float) -> Mapping[PeerId, tuple[str, ...]]:
        """The servers of a model revision: see `find_key`."""
        return await self.find_key(provider_key(self._knowledge.swarm, revision), seconds)

    async def find_key(self, key: bytes, seconds: float) -> Mapping[PeerId, tuple[str, ...]]:
        """The peers in the table that were found within `seconds`, with addresses.

        They come in turns of the peers that named them, those of our own configuration first: a liar's long
        list is no more likely to be used than the short list of an honest peer.
        """
        _, named = await self._look_up(key, Kind.GET_PROVIDERS, seconds)
        own = self.providers.of(key, trio.current_time(), self._rng)
        trusted = [list(named.pop(peer)) for peer in list(named) if peer in self._knowledge.ways_in]
        peers: dict[PeerId, tuple[str, ...]] = {}
        for contact in (*_in_turns(trusted), *_in_turns([own, *named.values()])):
            if contact.peer != self._host.peer_id:
                together = dict.fromkeys([*peers.get(contact.peer, ()), *contact.addresses])
                peers[contact.peer] = tuple(together)[:MAX_ADDRESSES]
        return peers

    async def ask(self, contact: Contact, question: Message) -> Message | None:
        """The peer's answer; None without one.  A peer that answers enters the table."""
        if contact.peer == self._host.peer_id:
            await trio.lowlevel.checkpoint()
            return None
        stream: ByteStream | None = None
        try:
            with trio.move_on_after(ASK_SECONDS):
                stream = await self._host.open_bytes(
                    contact.peer, contact.addresses, PROTOCOL, seconds=ASK_SECONDS
                )
                messages = MessageStream(stream, contact.peer, self._limits.kademlia_message_bytes)
                await messages.send(question, ASK_SECONDS)
                answer = await messages.receive(ASK_SECONDS)
                await stream.aclose()
                stream = None
                if answer is None or answer.kind != question.kind:
                    raise RemoteProtocolError(f"no answer to {question.kind.name}")
                self.table.answered(contact, trio.current_time())
                return answer
        except PeerFault as fault:
            if not isinstance(fault, PeerGone | RemoteProtocolError):
                self._host.charge(contact.peer, fault)
            log.debug("%s in the Kademlia table: %s", contact.peer, fault)
        finally:
            if stream is not None:
                stream.reset_now()
        self.table.failed(contact.peer)
        return None

    async def _look_up(
        self, key: bytes, kind: Kind, seconds: float
    ) -> tuple[Lookup, dict[PeerId, Sequence[Contact]]]:
        """Walk towards a key; the walk, and the providers that each peer named."""
        lookup = Lookup(self._host.peer_id, key, self._first_asked(), self.table.nearest(key))
        named: dict[PeerId, Sequence[Contact]] = {}

        def note(contact: Contact, answer: Message) -> None:
            named[contact.peer] = answer.providers

        with trio.move_on_after(seconds):
            await walk(lookup, lambda contact: self.ask(contact, Message(kind, key)), note)
        return lookup, named

    def _ways_in(self) -> list[Contact]:
        return [Contact(peer, addresses) for peer, addresses in self._knowledge.ways_in.items()]

    def _first_asked(self) -> list[Contact]:
        """Our own ways in, then some connected peers with a record: the starts of a lookup."""
        connected = [Contact(peer, self._knowledge.addresses(peer)) for peer in self._host.connected()]
        servers = sorted((each for each in connected if each.addresses), key=lambda each: each.peer)
        return self._ways_in() + self._rng.sample(servers, min(CONNECTED_ASKED, len(servers)))

    # --- questions of others ---

    async def serve(self, stream: ByteStream, peer: PeerId, prefix: str) -> None:
        """Answer one stream; end it where others cannot dial this node.

        Raises PeerFault, for the host to count.
        """
        if not self._knowledge.is_dialled():
            await trio.lowlevel.checkpoint()
            return  # a table with such nodes has long lookups for everybody
        now, seconds = trio.current_time(), self._limits.libp2p_stream_seconds
        scope = trio.CancelScope(deadline=now + seconds)
        place = ServedStream(PROTOCOL, peer, prefix, now, scope.cancel)
        if not self._places.enter(place):
            raise PeerGone(f"there is no place for one more Kademlia stream of {peer}")
        try:
            with scope:
                await self._answer_all(
                    MessageStream(stream, peer, self._limits.kademlia_message_bytes), peer, prefix
                )
                return
        finally:
            self._places.leave(place)
        if trio.current_time() < scope.deadline:
            raise PeerGone("a Kademlia stream made way for another peer's")
        raise SlowPeer(f"a Kademlia stream that was not done within {seconds:g} s")

    async def _answer_all(self, messages: MessageStream, peer: PeerId, prefix: str) -> None:
        self._meet(peer)
        seconds = self._limits.libp2p_stream_seconds
        for _ in range(MAX_MESSAGES):
            question = await messages.receive(seconds)
            if question is None:
                return
            await trio.sleep(self._budget(peer).take(1, trio.current_time()))
            await messages.send(self._answer(question, peer, prefix), seconds)

    def _answer(self, question: Message, peer: PeerId, prefix: str) -> Message:
        """Raises RemoteProtocolError for a question that no node of ours asks."""
        kind, key, now = question.kind, question.key, trio.current_time()
        if kind is Kind.PING:
            return Message(kind)
        if kind in (Kind.PUT_VALUE, Kind.GET_VALUE) or not key:
            raise RemoteProtocolError(f"{kind.name} with a key of {len(key)} bytes: no values are kept here")
        closer = tuple(each for each in self.table.nearest(key, NEAREST + 1) if each.peer != peer)[:NEAREST]
        if kind is Kind.FIND_NODE:
            return Message(kind, key, closer)
        if kind is Kind.GET_PROVIDERS:
            return Message(kind, key, closer, tuple(self.providers.of(key, now, self._rng)))
        if not key.startswith(_SHA256_MULTIHASH) or len(key) != 34:
            raise RemoteProtocolError(f"a provider of a key of {len(key)} bytes, which is none of ours")
        for contact in question.providers:
            addresses = self._knowledge.addresses(peer) or contact.addresses
            usable = tuple(text for text in addresses if is_local(prefix) or _is_public(text))
            if contact.peer == peer and usable:  # a peer speaks for itself alone
                self.providers.add(key, Contact(peer, usable), now)
        return Message(kind, key)

    def _budget(self, peer: PeerId) -> TokenBucket:
        limits, now = self._limits, trio.current_time()
        if peer not in self._budgets:
            while len(self._budgets) >= STRANGERS_KEPT:
                self._budgets.popitem(last=False)
            rate = limits.kademlia_questions_per_peer_per_second
            self._budgets[peer] = TokenBucket.full(rate, limits.kademlia_questions_per_peer_burst, now)
        self._budgets.move_to_end(peer)
        return self._budgets[peer]

    # --- strangers ---

    def _meet(self, peer: PeerId) -> None:
        """Remember to ask a peer that asked us: it enters the table if it answers too."""
        if peer in self.table or peer in self._asked or not self._knowledge.addresses(peer):
            return
        while len(self._asked) >= STRANGERS_KEPT:
            del self._asked[next(iter(self._asked))]
        try:
            self._strangers[0].send_nowait(peer)
            self._asked[peer] = None
        except trio.WouldBlock:
            log.debug("too many new peers ask the Kademlia table")

    async def meet_strangers(self) -> None:
        """Ask the peers that asked us, one after the other, over the connection that there is."""
        async for peer in self._strangers[1]:
            if peer in self._host.connected():
                contact = Contact(peer, self._knowledge.addresses(peer))
                await self.ask(contact, Message(Kind.FIND_NODE, provider_key(self._knowledge.swarm, "")))


def _in_turns(lists: Iterable[Sequence[Contact]]) -> Iterator[Contact]:
    return (contact for row in zip_longest(*lists) for contact in row if contact is not None)


def _is_public(multiaddr: str) -> bool:
    address = parse_address(multiaddr)
    return address.kind not in ("ip4", "ip6") or reach_of(address.host) is Reach.PUBLIC


@asynccontextmanager
async def open_kademlia(
    host: KademliaHost, knowledge: Knowledge, limits: Limits, rng: random.Random, *, serves: bool
) -> AsyncIterator[Kademlia]:
    """A Kademlia table, run until the end of the block.

    serves: hold a part of it and answer others; False for clients, which only ask.
    """
    kademlia = Kademlia(host, knowledge, limits, rng)
    async with background_nursery() as nursery:
        if serves:
            host.handle_bytes(PROTOCOL, kademlia.serve)
            nursery.start_soon(kademlia.meet_strangers)
        yield kademlia
