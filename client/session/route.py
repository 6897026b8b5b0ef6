"""The hops of a session, and how they are changed: found, opened, told of each other, and filled up.

A route is sound or broken.  Once something has broken it (`fail`, `break_off`), `repair` makes it
sound again: a chain that keeps the hops which are well and fills the gaps (`_best`), every hop of it
in a new epoch with its neighbours (`_line_up`), each told how much of its cache stays good and who
sends what again (`client.session.replay_plan.plan`).  If anything fails on the way it begins
anew, with what it has learnt.  Who is to blame is decided here, in `fail` and `note`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Protocol

import trio

from client.session.hop_link import HopLink
from client.session.replay_plan import Plan, Sent, Standing, plan
from client.session.trace import Trace
from node.model.blocks.rope import LengthRope
from node.network.streams import FramedStream
from node.runtime.nurseries import background_nursery
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.codecs import codec_for, recode
from tensor_codec.errors import CacheFull, PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import REPLAY_TOKENS, Contract
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    Open,
    Relink,
    Resume,
    Step,
    encode_resume,
)
from tensor_codec.span_spec import SpanSpec

# For a hop to be dialled, find room for the session and answer.  Doubles with every attempt: somebody else
# may be quicker, but where everybody is that slow it has to be waited for.
OPEN_SECONDS = 2.5
RELINK_SECONDS = 2.0  # for a hop to say where it stands, a dial to its successor not included
MAX_REFUSED_SECONDS = 15.0  # that a peer is left alone which says no again and again
CHOICES = 3  # of a chain for a new session, whose hops turn out to be busier than was known
LOOK_AGAIN_SECONDS = 0.5  # between looks for a chain while there is none


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session asks of every hop.

    codec: how hidden states travel: "fp32" or "bf16", or "auto": so that nothing is lost along the hops
    that the session has at the time.
    rope: what in the model depends on a sequence's length, if anything does.
    """

    model: str
    revision: str
    blocks: int
    hidden: int
    batch: int
    max_length: int
    codec: str
    rope: LengthRope | None = None

    @property
    def kept_codec(self) -> str:
        """How the client keeps what it sends: as it came, where the hops may come to want that."""
        return "fp32" if self.codec == "auto" else self.codec


class Surroundings(Protocol):
    """What a session needs of the swarm around it.  See `client.swarm.Swarm`."""

    def choose(
        self,
        start: int,
        stop: int,
        *,
        without: frozenset[PeerId] = frozenset(),
        desperate: bool = False,
        like: frozenset[str] = frozenset(),
        tokens: int = 0,
        beside: int = 0,
        seen: dict[PeerId, float] | None = None,
    ) -> Chain:
        """The best chain over blocks [start, stop) known now, of peers that may be used.  Raises NoChain.

        without: peers not to be used.  desperate: peers that have failed lately may be.
        like: kinds of peers (`kind_of`) to be preferred to all others.  tokens: of cache that the session
        may come to need; peers that have less free are used only where nobody else is left, those that
        take no session so long never.
        beside: hops that the session's chain has for its other blocks.
        seen: seconds per block of peers as this session sees them now.
        """

    def cost(self, hops: Sequence[Hop], seen: dict[PeerId, float]) -> float:
        """Expected seconds of a step along these hops."""

    def learn(self, hops: Sequence[Hop], held: Sequence[float], total: float) -> None:
        """A decode step of one row took `total` seconds along these hops, which say how long each had it."""

    def kind_of(self, peer: PeerId) -> str | None:
        """What it computes in; the same kind gives the same tokens.  None: it has left."""

    def dtype_of(self, peer: PeerId) -> str | None:
        """The dtype that it announces, or None where it has left."""

    def told(self, peer: PeerId, queue: float) -> bool:
        """A hop says how long steps wait there now; whether that is much longer than was known."""

    async def changed(self, seconds: float) -> bool:
        """Wait for news of the swarm; False when there were none in so many seconds."""

    async def open_stream(self, peer: PeerId, protocol: str) -> FramedStream:
        """Raises PeerFault."""

    def fault(self, peer: PeerId, error: PeerFault) -> None:
        """A peer was wrong, slow or gone: it is to be avoided for a while."""

    def refused(self, peer: PeerId, retry_after_seconds: float | None) -> None:
        """A peer said no: others are to be asked for a while."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a session stands: what all hops have to be brought to.

    position: of the first step that will be sent again, or the session's length.
    sent: steps without an answer.  again: the numbers of those that will be sent again.
    """

    position: int
    sent: Sequence[Sent]
    again: Sequence[int]


class Feeder(Protocol):
    """What goes along a route.  See `client.session.session.Session`."""

    def stand(self) -> Stand:
        """Where the session stands now."""

    async def send_again(self) -> None:
        """Send the steps without an answer, all hops being where `stand` said.  Raises PeerFault."""

    async def hear(self, link: HopLink, frame: Buffer) -> None:
        """A hop has said something.  Raises PeerFault."""


@dataclass(slots=True, eq=False)
class Route:
    """The hops of one session.  Their tasks run in `nursery` until `close`.

    contract: its codec is that of the present epoch.  first: the chain to be opened, where it was chosen.
    journal: what was sent to the first hop, in `terms.kept_codec`.  epoch: grows with every change.
    behind_replay: what is sent must not overtake a replay that may still be under way.
    broken_at: on trio's clock; None while the route is sound.
    resumed: when the last repair was done and since when the route had been broken, until an answer.
    """

    terms: Terms
    contract: Contract
    around: Surroundings
    feeder: Feeder
    journal: Journal
    nursery: trio.Nursery
    limits: Limits
    trace: Trace
    first: Chain | None = None
    hops: list[HopLink] = field(default_factory=list)
    chain: Chain = field(default_factory=lambda: Chain((), 0.0))
    epoch: int = 0
    behind_replay: bool = False
    broken_at: float | None = field(default_factory=trio.current_time)
    resumed: tuple[float, float] | None = None
    last_error: PeerFault | Refused | None = None  # since the last answer
    news: trio.Event = field(default_factory=trio.Event)
    closed: bool = False
    kinds: frozenset[str] = frozenset()  # of the peers: others would give other tokens
    _links: set[HopLink] = field(default_factory=set)  # whose tasks run
    _apart: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # cannot reach each other
    _carried: set[tuple[PeerId, PeerId]] = field(default_factory=set)  # as the trace has been told
    _patience: float = OPEN_SECONDS
    _codecs: list[tuple[int, str]] = field(default_factory=list)  # since which epoch
    _fed: bool = False  # whether anything has been sent to any hop
    _never: frozenset[PeerId] = frozenset()  # peers that cannot serve this session at all
    _refusals: Counter[PeerId] = field(default_factory=Counter)
    _unanswered: set[PeerId] = field(default_factory=set)  # hops that are to take a new route
    _why: str = "opening"
    _troubles: int = 0
    _repairing: trio.Lock = field(default_factory=trio.Lock)
    _switching: trio.CancelScope | None = None

    async def repair(self, deadline: float) -> None:
        """Make the route sound, if it is not: open it, or replace hops that have failed.

        deadline: on trio's clock.  Raises NoChain, PeerFault, Refused when it has passed.
        """
        try:
            with trio.fail_at(deadline):
                async with self._repairing:
                    self._patience = OPEN_SECONDS
                    while self.broken_at is not None:
                        if self.closed:
                            raise PeerGone("the session was closed")
                        await self._try_to_repair()
                        self._patience *= 2
        except trio.TooSlowError:
            raise self._reason() from self.last_error

    async def _try_to_repair(self) -> None:
        chain, self.first = self.first, None
        try:
            await self._switch(chain or await self._find())
        except (PeerFault, Refused) as error:
            self.last_error = error

    async def move(self, why: str, deadline: float) -> None:
        """Leave the hops that are to be avoided, while they work; stay where nobody else can serve.

        Raises as `repair`.
        """
        try:
            self._best(desperate=False)
        except NoChain:
            return
        self.break_off(why)
        await self.repair(deadline)

    async def send(self, step: Step) -> None:
        """Send a step to the first hop.  Raises PeerFault, which is noted."""
        first, self._fed = self.hops[0], True
        await self._noting(first, partial(first.send_step, step, self.limits.session_idle_seconds))

    async def carry(self, link: HopLink, step: Step) -> None:
        """Take what a hop made to the next one, which it cannot reach."""
        following = self.hops[self.hops.index(link) + 1]
        try:
            await following.send_step(step, self.limits.session_idle_seconds)
        except PeerFault as fault:
            self.fail(following, fault)

    async def calm_down(self) -> None:
        """Everything that was sent has been answered: steps need no streams of their own any more."""
        if not self.behind_replay:
            for link in self.hops:
                if link.has_bulk:
                    await link.end_bulk()

    def close(self) -> None:
        """Leave all hops: their tasks say goodbye and close the streams."""
        if not self.closed:
            self.closed = True
            self.trace.add("ended")
        for link in self._links:
            link.scope.cancel()
        self.tell()

    async def wait_closed(self) -> None:
        """Until all streams are closed."""
        while self._links:
            await self.news.wait()

    def tell(self) -> None:
        """Wake whoever waits for news."""
        self.news.set()
        self.news = trio.Event()

    def break_off(self, why: str) -> None:
        """The route has to be repaired before anything else is sent."""
        self._troubles += 1
        if self.broken_at is None:
            self.broken_at, self._why = trio.current_time(), why
        self.tell()

    def out_of_reach(self, link: HopLink, peer: PeerId) -> None:
        """A hop cannot push to the next one; whether that one is dead or only too far will be seen."""
        self._apart.add((link.hop.peer, peer))
        self.break_off(f"{link.hop.peer} cannot reach {peer}")

    def leave(self, link: HopLink, why: str) -> None:
        """A hop works, but too slowly: go elsewhere, if there is anybody else."""
        link.leaving = True
        try:
            self._best(desperate=False)
        except NoChain:
            link.leaving = False
            return
        self.trace.add("fault", peer=link.hop.peer, error=why)
        self.around.refused(link.hop.peer, None)
        self.break_off(why)

    def refused(self, link: HopLink, error: Refused) -> None:
        """A hop could not take a step, and may be able to later."""
        link.refused = True
        self.note(link.hop.peer, error)
        self.break_off(f"{link.hop.peer} refused a step")

    def fail(self, link: HopLink, error: PeerFault | Refused, *, blame: bool = True) -> None:
        """A hop is of no use any more."""
        if not link.alive:
            return
        link.fail(error, blame=blame)
        if blame:
            self.note(link.hop.peer, error)
        else:
            self.trace.add("fault", peer=link.hop.peer, error=str(error))
        if link in self.hops and not self.closed:
            self.break_off(str(error))
        if self._switching is not None:
            self._switching.cancel()

    def note(self, peer: PeerId, error: PeerFault | Refused) -> None:
        """Remember what a peer did.  Our own bugs never come here."""
        error.peer = error.peer or peer
        self.last_error = error
        self.trace.add("fault", peer=peer, error=f"{type(error).__name__}: {error}")
        if isinstance(error, Refused):
            self._refusals[peer] += 1  # who says "soon" again and again is to be believed less and less
            if error.retry_after_seconds is None and type(error) in (Refused, CacheFull):
                self._never |= {peer}  # what this session asks for it will not have later either
            soon, times = error.retry_after_seconds, 2 ** min(self._refusals[peer] - 1, 8)
            self.around.refused(peer, None if soon is None else min(soon * times, MAX_REFUSED_SECONDS))
        else:
            self.around.fault(peer, error)

    def _reason(self) -> Exception:
        """Why there is no sound route at the deadline."""
        if isinstance(self.last_error, Refused):
            return self.last_error
        try:
            self._best(desperate=False)
        except NoChain as missing:
            missing.after = self.last_error
            return missing
        if self.last_error is not None:
            return self.last_error
        waited_for = sorted(self._unanswered) or [link.hop.peer for link in self.hops]
        late = SlowPeer(f"the route could not be changed by the deadline, for {', '.join(waited_for)}")
        late.peer = next(iter(waited_for), None)
        return late

    async def _find(self) -> Chain:
        """The chain to go on with, as soon as there is one; with peers that failed, after a while."""
        desperate_at = trio.current_time() + LOOK_AGAIN_SECONDS
        while True:
            now = trio.current_time()
            try:
                return self._best(desperate=now >= desperate_at)
            except NoChain:
                pass
            await self.around.changed(desperate_at - now if now < desperate_at else LOOK_AGAIN_SECONDS)

    def _best(self, *, desperate: bool) -> Chain:
        """Keep the hops that are well and fill the gaps; where that cannot be, the best chain of all.

        Raises NoChain.
        """
        kept = [link for link in self.hops if link.alive and (desperate or not link.avoided)]
        tokens = self.terms.batch * self.terms.max_length
        choose = partial(self.around.choose, desperate=desperate, like=self.kinds, tokens=tokens)
        gone = self._never.union(link.hop.peer for link in self.hops if link.avoided and not desperate)
        taken = frozenset(link.hop.peer for link in kept) | gone
        hops: list[Hop] = [link.hop for link in kept]
        try:
            gaps = _gaps(hops, self.terms.blocks)
            for done, (start, stop) in enumerate(gaps, 1):  # each gap still to come takes a hop at least
                hops += choose(start, stop, without=taken, beside=len(hops) + len(gaps) - done).hops
        except NoChain:
            return choose(0, self.terms.blocks, without=gone)
        hops.sort(key=lambda hop: hop.start)
        peers = [hop.peer for hop in hops]
        if len(set(peers)) < len(peers):  # two gaps filled by one peer, which can serve a session once
            return choose(0, self.terms.blocks, without=gone)
        return Chain(tuple(hops), 0.0)

    async def _switch(self, chain: Chain) -> None:
        """Change to this route: open it where it is new, say so where it is not, fill up what is missing.

        Raises PeerFault, Refused; what failed is noted, and the next attempt keeps the rest.
        """
        began, troubles = trio.current_time(), self._troubles
        self._switching = scope = trio.CancelScope()
        try:
            with scope:
                links, fresh = await self._line_up(chain)
                await self._fill_up(links, fresh, began)
        finally:
            self._switching = None
        if self._troubles == troubles and not scope.cancelled_caught:
            self.broken_at = None
        elif scope.cancelled_caught and self.last_error is not None:
            raise self.last_error

    async def _line_up(self, chain: Chain) -> tuple[list[HopLink], bool]:
        """Every hop of the chain in the new epoch, with its neighbours; whether all of them are new.

        Raises PeerFault, Refused, which are noted.
        """
        first, choices = not any(link.alive for link in self._links), 1
        while True:
            self.epoch += 1
            peers = {hop.peer for hop in chain.hops}
            for link in self._links:
                if link.hop.peer in peers and link.hop not in chain.hops:
                    link.scope.cancel()  # it serves other blocks of this session from now on
            known = {link.hop: link for link in self._links if link.alive}
            links = [known.get(hop) for hop in chain.hops]
            held = any(links) or self.feeder.stand().position > 0
            dtypes = [
                link.dtype if link else self.around.dtype_of(hop.peer)
                for hop, link in zip(chain.hops, links, strict=True)
            ]
            self._agree_on_codec(dtypes, kept=any(links))
            made = await self._each_hop(chain.hops, links, dtypes, held=held)
            apart = [
                (one.hop.peer, two.hop.peer) for one, two in pairwise(made) if not one.push and not one.relay
            ]
            if apart:
                self._apart.update(apart)
                continue
            busy = [
                self.around.told(link.hop.peer, link.queue)
                for link, old in zip(made, links, strict=True)
                if not old
            ]
            if first and choices < CHOICES and any(busy) and (other := self._instead_of(chain)) is not None:
                chain, choices = other, choices + 1
                continue
            return made, not held

    def _agree_on_codec(self, dtypes: Sequence[str | None], *, kept: bool) -> None:
        """How hidden states travel from this epoch on.

        kept: some hops go on: they have been given what the codec until now left of it.  So a session
        never goes back to a narrower one while they do, which would gain bytes and lose what is kept;
        unless nothing has been sent yet.
        """
        codec = self.terms.codec
        if codec == "auto":
            codec = codec_for(frozenset(dtype for dtype in dtypes if dtype is not None))
            if kept and self._fed and self.contract.codec == "fp32":
                codec = "fp32"
        if not self._codecs or codec != self.contract.codec:
            self._codecs.append((self.epoch, codec))
            self.contract = replace(self.contract, codec=codec)

    def contract_in(self, epoch: int) -> Contract:
        """What was agreed on in an epoch: a hop's answer may be of an earlier one."""
        for since, codec in reversed(self._codecs):
            if since <= epoch:
                same = codec == self.contract.codec
                return self.contract if same else replace(self.contract, codec=codec)
        return self.contract

    def _instead_of(self, chain: Chain) -> Chain | None:
        """The best chain by what is known now, if that is another one."""
        with contextlib.suppress(NoChain):
            best = self._best(desperate=False)
            return best if best.hops != chain.hops else None
        return None

    async def _each_hop(
        self,
        hops: Sequence[Hop],
        known: Sequence[HopLink | None],
        dtypes: Sequence[str | None],
        *,
        held: bool,
    ) -> list[HopLink]:
        """Open or relink all hops at once; the first failure cancels the rest.  Raises it."""
        made: dict[int, HopLink] = {}
        failure: PeerFault | Refused | None = None
        self._unanswered.clear()

        async def one(index: int) -> None:
            nonlocal failure
            link = known[index]
            self._unanswered.add(hops[index].peer)
            try:
                if link is None:
                    with trio.move_on_after(self._patience) as waited:
                        made[index] = await self._open(hops, index, dtypes[index], held=held)
                    if waited.cancelled_caught:
                        raise SlowPeer(f"the session could not be opened within {self._patience:g} s")
                else:
                    made[index] = link
                    await self._relink(hops, index, link)
            except (PeerFault, Refused) as error:
                error.peer = error.peer or hops[index].peer
                if link is not None:
                    self.fail(link, error)
                else:
                    self.note(hops[index].peer, error)
                failure = failure or error
                nursery.cancel_scope.cancel()
            self._unanswered.discard(hops[index].peer)

        async with trio.open_nursery() as nursery:
            for index in range(len(hops)):
                nursery.start_soon(one, index)
        if failure is not None:
            raise failure
        return [made[index] for index in range(len(hops))]

    def _neighbours(self, hops: Sequence[Hop], index: int) -> tuple[str | None, str | None, bool]:
        """Predecessor and successor of a hop, where it is to know them; whether we carry its outputs."""
        last = index == len(hops) - 1
        peers = [hop.peer for hop in hops]
        in_reach = index > 0 and (peers[index - 1], peers[index]) not in self._apart
        out_of_reach = not last and (peers[index], peers[index + 1]) in self._apart
        predecessor = peers[index - 1] if in_reach else None
        successor = None if last or out_of_reach else peers[index + 1]
        return predecessor, successor, out_of_reach

    async def _open(self, hops: Sequence[Hop], index: int, dtype: str | None, *, held: bool) -> HopLink:
        hop, terms = hops[index], self.terms
        predecessor, successor, relay = self._neighbours(hops, index)
        if dtype is None:
            raise PeerGone(f"{hop.peer} has just left the swarm")
        stream = await self.around.open_stream(hop.peer, SESSION_PROTOCOL)
        link = HopLink(hop, stream, dtype, self.contract.codec)
        link.relay, link.fed = relay, predecessor is None
        opened = Open(
            session=self.contract.session,
            spec=SpanSpec(terms.model, terms.revision, hop.blocks, dtype),
            batch=terms.batch,
            max_length=terms.max_length,
            codec=self.contract.codec,
            predecessor=predecessor,
            successor=successor,
            relay=relay,
            epoch=self.epoch,
            held=held,
        )
        try:
            await link.open(opened, self.limits)
        except BaseException:
            await link.say_goodbye()
            raise
        self._links.add(link)
        await self.nursery.start(self._listen, link)
        return link

    async def _relink(self, hops: Sequence[Hop], index: int, link: HopLink) -> None:
        predecessor, successor, relay = self._neighbours(hops, index)
        link.relay, link.fed, link.refused = relay, predecessor is None, False
        await link.end_bulk()
        seconds = RELINK_SECONDS + (self.limits.successor_seconds if successor is not None else 0.0)
        codec = self.contract.codec if link.codec != self.contract.codec else None
        await link.relink(Relink(self.epoch, predecessor, successor, relay, codec), seconds)

    async def _fill_up(self, links: list[HopLink], fresh: bool, began: float) -> None:
        """Let every hop have what it lacks, and send the steps without an answer again.

        Raises PeerFault, which is noted.
        """
        before, self.hops = self.hops, links
        hops = tuple(link.hop for link in links)
        self.chain = Chain(hops, self.around.cost(hops, {}))
        self.kinds = frozenset(k for link in links if (k := self.around.kind_of(link.hop.peer)))
        self._tell_of_the_route(before, links, began)
        if not fresh:
            stand = self.feeder.stand()
            todo = plan([link.standing for link in links], stand.position, stand.sent, stand.again)
            await self._order(todo, links)
            self.behind_replay |= bool(todo.replays) or todo.client_from < stand.position
            async with background_nursery() as nursery:
                nursery.start_soon(self._watch, links)
                await self._replay(links, todo, stand.position)
        for link in self._links - set(links):
            link.scope.cancel()
        for link in links:
            link.here = link.asked_at = None
        await self.feeder.send_again()
        if before and before != links:
            self.resumed = trio.current_time(), self.broken_at or began

    async def _order(self, todo: Plan, links: Sequence[HopLink]) -> None:
        for link, order in zip(links, todo.orders, strict=True):
            try:
                await link.send(encode_resume(Resume(self.epoch, order.length, order.has, order.stop)))
            except PeerFault as fault:
                self.fail(link, fault)
                raise
            link.standing = Standing(order.length, cut=link.standing.cut)
        for place, start, stop in todo.replays:
            self._tell_of_a_replay(links[place].hop.peer, links[place + 1].hop.peer, start, stop)

    async def _replay(self, links: Sequence[HopLink], todo: Plan, position: int) -> None:
        """Send the first hop what it lacks.  Raises PeerFault, which is noted."""
        for link in links:
            if link.fed and (link is not links[0] or todo.client_from < position):
                open_push = partial(self.around.open_stream, link.hop.peer, PUSH_PROTOCOL)
                await self._noting(link, partial(link.begin_bulk, open_push))
        if todo.client_from == position:
            return
        first = links[0]
        self._tell_of_a_replay("client", first.hop.peer, todo.client_from, position)
        part = min(REPLAY_TOKENS, self.contract.max_tokens)
        for start, stop, rope_length in self.journal.parts(todo.client_from, position, part):
            body = recode(self.journal.read(start, stop), self.terms.kept_codec, self.contract.codec)
            message = Step(self.contract.session, 0, start, "replay", body, (), self.epoch, True, rope_length)
            await self._noting(first, partial(first.send_step, message, self.limits.session_idle_seconds))

    async def _watch(self, links: Sequence[HopLink]) -> None:
        """While a replay goes on, which may be held back: ask every hop whether it lives."""
        while True:
            await trio.sleep(RELINK_SECONDS / 2)
            for link in links:
                with trio.CancelScope(shield=True), trio.move_on_after(0.5), contextlib.suppress(PeerFault):
                    await link.ask()  # one that was cut short would take the stream with it
            await trio.sleep(RELINK_SECONDS / 2)
            for link in links:
                if link.asked_at is not None:
                    self.fail(link, SlowPeer(f"{link.hop.peer} has said nothing for {RELINK_SECONDS:g} s"))

    async def _noting(self, link: HopLink, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
        except PeerFault as fault:
            self.fail(link, fault)
            raise

    def _tell_of_the_route(self, before: Sequence[HopLink], links: Sequence[HopLink], began: float) -> None:
        hops = [{"peer": link.hop.peer, "blocks": [link.hop.start, link.hop.stop]} for link in links]
        seconds = trio.current_time() - began
        for one, two in pairwise(links):
            if one.relay and (one.hop.peer, two.hop.peer) not in self._carried:
                self._carried.add((one.hop.peer, two.hop.peer))
                self.trace.add("relayed", sender=one.hop.peer, peer=two.hop.peer)
        if not before:
            self.trace.add("opened", hops=hops, codec=self.contract.codec, seconds=seconds)
            return
        self.trace.add(
            "rerouted",
            why=self._why,
            kept=[link.hop.peer for link in links if link in before],
            opened=[link.hop.peer for link in links if link not in before],
            hops=hops,
            codec=self.contract.codec,
            seconds=seconds,
        )

    def _tell_of_a_replay(self, sender: str, peer: str, start: int, stop: int) -> None:
        size = (stop - start) * self.contract.row_bytes
        self.trace.add("replayed", sender=sender, peer=peer, start=start, stop=stop, bytes=size)

    async def _listen(self, link: HopLink, task_status: trio.TaskStatus[None]) -> None:
        """Read what a hop says until the session leaves it; then say goodbye."""
        try:
            with link.scope:
                task_status.started()
                while (frame := await link.stream.receive()) is not None:
                    await self.feeder.hear(link, frame)
                self.fail(link, PeerGone(f"{link.hop.peer} ended the session"))
        except PeerFault as fault:
            self.fail(link, fault)
        finally:
            await link.say_goodbye()
            self._links.discard(link)
            self.tell()


def _gaps(hops: Iterable[Hop], blocks: int) -> list[tuple[int, int]]:
    """The runs of blocks that none of these hops, which do not overlap, serves."""
    gaps, reached = [], 0
    for hop in sorted(hops, key=lambda hop: hop.start):
        if reached < hop.start:
            gaps.append((reached, hop.start))
        reached = hop.stop
    if reached < blocks:
        gaps.append((reached, blocks))
    return gaps
