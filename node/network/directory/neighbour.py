"""One stream of record exchange: the records that this node owes, and the records that it accepts."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import trio

from node.network.prefixes import is_local, network_of
from routing.names import PeerId
from routing.view.exchange import Digest, encode_digest, encode_records
from routing.view.view import Arrival, SwarmView
from tensor_codec.errors import MessageError, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.token_bucket import TokenBucket

if TYPE_CHECKING:
    from node.network.streams import FramedStream

Key = TypeVar("Key")
Value = TypeVar("Value")

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 60.0
BUDGETS_KEPT = 1024  # peers whose budgets are remembered
RETRIES_KEPT = 1024  # peers that could not be reached
RECORDS_AT_ONCE = 30  # about a frame, after which our own record may go first
ASKS_PER_SECOND, ASKS_BURST = 1.0, 5.0  # the answer to a digest can be a whole view


@dataclass(slots=True)
class Retry:
    """When a peer may be dialled again: after 1 s, doubling to 60 s, less up to half by chance."""

    failures: int = 0
    not_before: float = 0.0

    def failed(self, now: float, rng: random.Random) -> None:
        """Wait longer than last time."""
        seconds = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**self.failures)
        self.failures = min(self.failures + 1, 10)
        self.not_before = now + seconds * rng.uniform(0.5, 1.0)


class Retries:
    """Pauses before peers are dialled again; at most RETRIES_KEPT of them are kept."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._retries: dict[PeerId, Retry] = {}

    def may_dial(self, peer: PeerId) -> bool:
        """Whether the pause after the last failure is over."""
        retry = self._retries.get(peer)
        return retry is None or trio.current_time() >= retry.not_before

    def failed(self, peer: PeerId) -> None:
        """Begin a pause, longer than the last one of that peer."""
        now = trio.current_time()
        self._retries.setdefault(peer, Retry()).failed(now, self._rng)
        if len(self._retries) > RETRIES_KEPT:
            self._retries = {p: retry for p, retry in self._retries.items() if retry.not_before > now}

    def forget(self, peer: PeerId) -> None:
        """The peer has answered: no pause any more."""
        self._retries.pop(peer, None)

    def clear(self) -> None:
        """Dial again at once: this machine is in another network now."""
        self._retries.clear()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a neighbour may send: records, and digests that ask for an answer.

    network: shared by the peers of one public network; None on this machine and in private networks.
    """

    records: TokenBucket
    asks: TokenBucket
    network: TokenBucket | None

    def records_due(self, cost: float, now: float) -> float:
        """Take the cost of some records, and return the seconds until it is covered."""
        wait = self.records.take(cost, now)
        return wait if self.network is None else max(wait, self.network.take(cost, now))


class Budgets:
    """The budgets of each peer and of each public network.

    A budget outlives its stream, so a new stream is no new budget; at most BUDGETS_KEPT of each are kept.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._peers: OrderedDict[PeerId, tuple[TokenBucket, TokenBucket]] = OrderedDict()
        self._networks: OrderedDict[str, TokenBucket] = OrderedDict()

    def of(self, peer: PeerId, prefix: str, *, whole_view: bool) -> Budget:
        """The budget of a peer.

        prefix: of its address.  whole_view: it may send a whole view at once, and no network counts.
        """
        now, limits = trio.current_time(), self._limits
        if peer not in self._peers:
            most = limits.max_records if whole_view else limits.records_per_peer_burst
            records = TokenBucket.full(limits.records_per_peer_per_second, most, now)
            self._peers[peer] = records, TokenBucket.full(ASKS_PER_SECOND, ASKS_BURST, now)
        network = None
        if not whole_view and not is_local(prefix):
            name, rate = network_of(prefix), limits.records_per_network_per_second
            if name not in self._networks:
                self._networks[name] = TokenBucket.full(rate, limits.records_per_network_burst, now)
            network = self._networks[name]
            _keep_latest(self._networks, name)
        _keep_latest(self._peers, peer)
        return Budget(*self._peers[peer], network)


def _keep_latest(budgets: OrderedDict[Key, Value], used: Key) -> None:
    budgets.move_to_end(used)
    while len(budgets) > BUDGETS_KEPT:
        budgets.popitem(last=False)


class Neighbour:
    """One records stream, opened by us (`ours`) or by the other side.

    The queue is a set of peers, not a list of records: a slow reader is owed at most one record of each
    peer, the newest.

    greeted: set when their first answer to our digest is whole and all of its records have come.
    scope: cancel it to end the exchange.
    """

    def __init__(self, stream: FramedStream, *, ours: bool) -> None:
        self.stream = stream
        self.peer = stream.peer
        self.prefix: str = getattr(stream, "prefix", "")
        self.ours = ours
        self.greeted = trio.Event()
        self.scope = trio.CancelScope()
        self.faults = 0
        self._owed: dict[PeerId, None] = {}  # a set that keeps its order
        self._proofs: list[Arrival] = []
        self._digests: set[bool] = set()  # digests to send, by their `ask`
        self._work = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self._heard: dict[bytes, int] = {}
        self._was_heard = False

    def owe(self, peers: Iterable[PeerId]) -> None:
        """Send the newest records of these peers as soon as possible."""
        self._owed.update(dict.fromkeys(peers))
        if self._owed:
            self._wake()

    def prove(self, ended: Arrival) -> None:
        """Show the other side a record of its own that has ended and that it no longer knows."""
        self._proofs = [ended]
        self._wake()

    def say_digest(self, *, ask: bool) -> None:
        """Send our digest, after the records owed by now."""
        self._digests.add(ask)
        self._wake()

    async def flushed(self) -> None:
        """Wait until nothing is owed and the last frame has been handed to the network."""
        await self._idle.wait()

    def _wake(self) -> None:
        if self._idle.is_set():
            self._idle = trio.Event()
        self._work.set()

    async def send_forever(self, view: Callable[[], SwarmView], own: PeerId) -> None:
        """Send the owed frames, records before digests, the record of `own` before all others.

        The other side reads a crowd of new peers slowly: the news of this node do not wait for it.
        Raises PeerFault.
        """
        while True:
            await self._work.wait()
            self._work = trio.Event()
            owed, self._owed = self._owed, {}
            proofs, self._proofs = self._proofs, []
            digests, self._digests = self._digests, set()
            while owed:
                part = self._next_part(owed, own)
                for frame in encode_records(view().held(part, trio.current_time())):
                    await self.stream.send(frame)
            for frame in encode_records(proofs):
                await self.stream.send(frame)
            for ask in sorted(digests):
                for frame in encode_digest(view().digest(), ask=ask):
                    await self.stream.send(frame)
            if not self._work.is_set():
                self._idle.set()

    def _next_part(self, owed: dict[PeerId, None], own: PeerId) -> list[PeerId]:
        """Take some peers out of `owed`: first our own, also where it is owed since a moment ago."""
        if own in owed or own in self._owed:
            part = [own]
            self._owed.pop(own, None)
        else:
            part = list(islice(owed, RECORDS_AT_ONCE))
        for peer in part:
            owed.pop(peer, None)
        return part

    async def next_frame(self, limits: Limits) -> bytearray | None:
        """Their next frame; None at the end of the exchange.  Raises PeerFault.

        A peer that opened the stream says something at once, another peer answers our digest.  A peer that is
        silent for long is asked for its digest.
        """
        seconds = limits.records_idle_seconds
        if not self._was_heard:
            seconds = limits.reply_taken_seconds if self.ours else limits.frame_start_seconds
        for _ in range(2):
            with trio.move_on_after(seconds):
                frame = await self.stream.receive()
                self._was_heard = True
                return frame
            if self.stream.in_frame:
                return await self.stream.receive()  # a frame that has begun has its own time
            if not self.ours and not self._was_heard:
                break
            self.say_digest(ask=True)
            seconds = limits.reply_taken_seconds
        raise SlowPeer(f"{self.peer} was silent for too long on a stream of records")

    def hear_digest(self, part: Digest, most: int) -> dict[bytes, int] | None:
        """Add one frame of a digest; return the whole digest after the last frame.  Raises MessageError."""
        self._heard.update(part.seqs)
        if len(self._heard) > most:
            raise MessageError(f"a digest of more than {most} peers")
        if not part.last:
            return None
        whole, self._heard = self._heard, {}
        return whole
