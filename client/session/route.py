"""The streams of a session: dials, sends, receives and times by the decisions of the session's core.

`Route.repair` makes the route sound, at the opening and after every fault: it waits for a chain, opens
the session at new hops and gives the others their new neighbours (`_line_up`), fills every hop with its
missing positions (`_fill_up`), and begins again after any fault on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from client.chains.chooser import SwarmAccess
from client.chains.shared_streams import Membership, SharedStream
from client.session.actions import (
    Action,
    Answered,
    Ask,
    Blame,
    Carry,
    Deliver,
    Event,
    Leave,
    Located,
    Lost,
    Note,
    Observe,
    ObserveSpeeds,
    Postpone,
    Repair,
    Reported,
    Send,
    StopSwitching,
    Unanswered,
)
from client.session.core import ClientSession, State
from client.session.hop_link import HopLink, move, open_link
from client.session.hop_state import HopState
from client.session.route_state import LineUp, Place, Refill
from client.session.trace import Trace
from node.runtime.nurseries import background_nursery
from routing.chains.distances import CLIENT
from routing.chains.hops import Chain, Hop
from routing.names import PeerId
from tensor_codec.codecs import check_finite, recode
from tensor_codec.errors import (
    LocalProtocolError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
)
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import REPLAY_TOKENS, Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    Here,
    Open,
    Relink,
    Relinked,
    Result,
    Resume,
    Step,
    begins_result,
    decode_from_hop,
    encode_resume,
)
from tensor_codec.messages.steps import check_result
from tensor_codec.span_spec import SpanSpec

# For the dial to a hop, its wait for free cache, and its answer.  Doubles with every attempt: other peers
# may be quicker, but if every peer is slow the session must wait.
OPEN_SECONDS = 2.5
RELINK_SECONDS = 2.0  # for a hop's report of its position, without the dial to its successor
CHOICES = 3  # of a chain for a new session, if its hops are busier than was known


@dataclass(slots=True, eq=False)
class Route:
    """The streams to the hops of one session.  Their tasks run in `nursery` until the session is closed.

    journal: the hidden states sent to the first hop, in `terms.kept_codec`.
    news: set, and made anew, when waiting tasks must look again.
    changing: held while hops get new neighbours.
    """

    core: ClientSession
    swarm: SwarmAccess
    journal: Journal
    nursery: trio.Nursery
    limits: Limits
    trace: Trace
    news: trio.Event = field(default_factory=trio.Event)
    _links: dict[HopState, HopLink] = field(default_factory=dict)  # whose tasks run
    _bulk: list[HopLink] = field(default_factory=list)  # with a stream of their own for bulk
    _unanswered: set[PeerId] = field(default_factory=set)  # hops that must take a new route
    changing: trio.Lock = field(default_factory=trio.Lock)
    _switching: trio.CancelScope | None = None

    @property
    def contract(self) -> Contract:
        """Of the present epoch."""
        return self.core.route.contracts.current

    async def repair(self, deadline: float) -> None:
        """Make the route sound, if it is not: open it, or replace hops that have failed.

        deadline: on trio's clock.  Raises NoChain, PeerFault, Refused when it has passed.
        """
        core = self.core
        if core.state is State.CLOSED:
            raise PeerGone("the session was closed")
        try:
            with trio.fail_at(deadline):
                async with self.changing:
                    open_seconds = OPEN_SECONDS
                    while core.state is not State.SOUND:
                        measured = core.terms.run if core.state is State.OPENING else None
                        chain = await self.swarm.wait_for_chain(core.route.choose, measured=measured)
                        await self._switch(chain, open_seconds)
                        open_seconds *= 2
        except trio.TooSlowError:
            raise core.route.why_none(core.last_error, sorted(self._unanswered)) from core.last_error

    def tell(self, event: Event) -> bool:
        """Give an event to the core and perform its actions; whether there are any.

        Only for events without a frame to send.
        """
        actions = self.core.receive(event, trio.current_time())
        self.apply(actions)
        return bool(actions)

    def apply(self, actions: Iterable[Action]) -> None:
        """Perform the actions that take no time."""
        for action in actions:
            match action:
                case Note(kind, data):
                    self.trace.add(kind, **data)
                case Deliver() | Repair():
                    self.wake()
                case Leave(hop):
                    if hop in self._links:
                        self._links[hop].scope.cancel()
                case StopSwitching():
                    if self._switching is not None:
                        self._switching.cancel()
                case Blame(peer, error, share):
                    self.swarm.fault(peer, error, share)
                case Postpone(peer, seconds):
                    self.swarm.refused(peer, seconds)
                case Observe(hops, held, total):
                    self.swarm.observe_step(hops, held, total)
                case ObserveSpeeds(hops, speeds):
                    self.swarm.measured.speeds.learn([CLIENT, *[hop.peer for hop in hops]], speeds)
                case _:
                    raise LocalProtocolError(f"{action} takes time")

    async def perform(self, actions: Iterable[Action]) -> None:
        """Perform all actions, frames to send included.  A failure goes to the core."""
        for action in actions:
            match action:
                case Deliver():
                    self.wake()
                case Ask(hop):
                    with contextlib.suppress(PeerFault):  # the reader of the stream sees it too
                        if hop in self._links:
                            await self._links[hop].ask()
                case Carry(hop, step):
                    with contextlib.suppress(PeerFault), self._noting(hop) as link:
                        await link.send_step(step, self.limits.session_idle_seconds)
                case _:
                    self.apply([action])

    async def send(self, send: Send) -> None:
        """Send a step to the first hop.  Raises PeerFault, which the core knows then."""
        pending, contract = send.pending, self.core.route.contracts.current
        what, packed = pending.what, pending.packed if self.core.route.pack else None
        body = packed
        if body is None:
            body = recode(pending.body, self.core.terms.kept_codec, contract.codec, contract.hidden)
        step = Step(
            contract.session,
            pending.step,
            what.position,
            what.reply,
            body,
            epoch=self.core.route.epoch,
            bulk=send.bulk,
            rope_length=what.rope_length,
            rows=what.rows,
            packed=packed is not None,
        )
        try:
            alone = len(self.core.steps.sent) <= 1
            await self.link(send.hop).send_step(step, self.limits.session_idle_seconds, alone=alone)
        except PeerFault as fault:
            self.tell(Lost(send.hop, fault))
            raise

    async def end_bulk(self) -> None:
        """All steps are answered: steps need no streams of their own any more."""
        while self._bulk:
            await self._bulk.pop().end_bulk()

    def wake(self) -> None:
        """Wake the tasks that wait for news."""
        self.news.set()
        self.news = trio.Event()

    async def wait_closed(self) -> None:
        """Wait until all streams are closed."""
        while self._links:
            await self.news.wait()

    # --- a new route ---

    async def _switch(self, chain: Chain, open_seconds: float) -> None:
        """Change to this chain, unless an event disturbs the change."""
        core, done, failure = self.core, False, None
        if core.state is State.CLOSED:
            raise PeerGone("the session was closed")
        core.begin_switch()
        self._switching = trio.CancelScope()
        began = trio.current_time()
        try:
            with self._switching:
                line_up, made = await self._line_up(chain, open_seconds)
                await self._fill_up(line_up, made, began)
                done = True
        except (PeerFault, Refused) as error:
            failure = error
        finally:
            self._switching = None
            core.end_switch(trio.current_time(), failure, done=done)

    async def _line_up(self, chain: Chain, open_seconds: float) -> tuple[LineUp, list[HopState]]:
        """Open or relink every hop of the chain in the new epoch, or of a better chain found now.

        Raises PeerFault, Refused, which the core knows then.
        """
        route, choices = self.core.route, 1
        first = not any(hop.alive for hop in route.opened)
        while True:
            line_up, actions = route.line_up(chain, self.core.steps.resume_point().position)
            self.apply(actions)
            made = await self._each_hop(line_up, open_seconds)
            if route.are_apart(made):
                continue
            busier = [
                self.swarm.report_queue(hop.hop.peer, hop.queue)
                for hop, place in zip(made, line_up.places, strict=True)
                if place.state is None
            ]
            if first and choices < CHOICES and any(busier):
                choices += 1
                if (other := route.instead_of(chain)) is not None:
                    chain = other
                    continue
            return line_up, made

    async def _each_hop(self, line_up: LineUp, open_seconds: float) -> list[HopState]:
        """Open or relink all hops at once; the first failure cancels the others.  Raises it."""
        made: dict[int, HopState] = {}
        failure: PeerFault | Refused | None = None
        self._unanswered.clear()
        began = trio.current_time()

        async def agree(index: int, place: Place) -> None:
            nonlocal failure
            self._unanswered.add(place.hop.peer)
            try:
                if place.state is not None:
                    await self.relink(line_up, place, place.state)
                    made[index] = place.state
                else:
                    now, peer = trio.current_time(), place.hop.peer
                    if (at := self.core.pauses.next_opening(peer, now)) > now:
                        await trio.sleep_until(at)
                    seconds = seconds_to_open(self, place, open_seconds)
                    with trio.move_on_after(seconds) as waited:
                        made[index] = await self.open(line_up, place)
                    if waited.cancelled_caught:
                        raise SlowPeer(f"the session could not be opened within {seconds:g} s")
            except (PeerFault, Refused) as error:
                if place.state is not None:
                    self.tell(Lost(place.state, error))
                else:
                    self.apply(self.core.note(place.hop.peer, error))
                failure = failure or error
                nursery.cancel_scope.cancel()
            self._unanswered.discard(place.hop.peer)

        async with trio.open_nursery() as nursery:
            for index, place in enumerate(line_up.places):
                nursery.start_soon(agree, index, place)
        if failure is not None:
            if isinstance(failure, Refused):
                seconds = trio.current_time() - began
                self.apply(self.core.route.postpone_late(self._unanswered, line_up, seconds))
            raise failure
        return [made[index] for index in range(len(line_up.places))]

    async def open(self, line_up: LineUp, place: Place) -> HopState:
        """Open the session at a new hop, or at a standby.  Raises PeerFault, Refused."""
        hop, terms, near = place.hop, self.core.terms, place.neighbours
        if place.dtype is None:
            raise PeerGone(f"{hop.peer} has just left the swarm")
        codec = line_up.contract.codec
        prompts = terms.prompts
        body = b"" if prompts is None else prompts.body_for(hop.blocks, codec, self.limits)
        state = HopState(hop, place.dtype, codec, near)
        shared = None if place.follows else shared_stream(self.swarm, hop)
        opened = Open(
            session=line_up.contract.session,
            spec=SpanSpec(terms.model, terms.revision, hop.blocks, place.dtype, terms.adapter_name),
            batch=terms.batch,
            max_length=terms.max_length,
            codec=codec,
            predecessor=near.predecessor,
            successor=near.successor,
            relay=near.relay,
            epoch=line_up.epoch,
            held=line_up.held,
            pack=place.pack,
            prompts=0 if prompts is None else prompts.positions,
            body=body,
            gather=b"" if shared is None else shared.id,
            follows=place.follows,
        )
        open_stream = partial(self.swarm.open_stream, hop.peer, SESSION_PROTOCOL)
        link = await open_link(state, open_stream, opened, terms.adapter, self.limits)
        try:
            self.core.route.check(state)
        except BaseException:
            await link.say_goodbye()
            raise
        self._links[state] = link
        if place.follows:
            self.core.route.standbys.add(state, line_up.epoch)
        else:
            self.core.route.add(state)
        if shared is not None:
            share(self, link, shared)
        if link.moves and not place.follows:
            self.core.ways.add(state, lambda: link.stream.has_better_way)
        await self.nursery.start(self._listen, link)
        return state

    async def relink(self, line_up: LineUp, place: Place, state: HopState) -> None:
        """Give a hop its new neighbours, and wait for its progress.  Raises PeerFault, Refused."""
        near, link = place.neighbours, self.link(state)
        state.relink(near)
        await link.end_bulk()
        if self.core.ways.wants(state):
            open_stream = partial(self.swarm.open_stream, state.hop.peer, SESSION_PROTOCOL)
            await move(link, self.core.ways, open_stream, line_up.contract.session)
        seconds = RELINK_SECONDS + (self.limits.successor_seconds if near.successor is not None else 0.0)
        codec = line_up.contract.codec if state.codec != line_up.contract.codec else None
        order = Relink(
            line_up.epoch, near.predecessor, near.successor, near.relay, codec, place.pack, place.follows
        )
        await link.relink(order, seconds)

    async def _fill_up(self, line_up: LineUp, made: Sequence[HopState], began: float) -> None:
        """Fill every hop with its missing positions, and send the steps without an answer again.

        Raises PeerFault, which the core knows then.
        """
        refill, actions = self.core.take_over(line_up, made, trio.current_time() - began)
        self.apply(actions)
        if refill is not None:
            for hop, order in refill.orders:
                with self._noting(hop) as link:
                    resume = Resume(line_up.epoch, order.length, order.has, order.stop, refill.step)
                    await link.send(encode_resume(resume))
            async with background_nursery() as nursery:
                nursery.start_soon(self._watch, made)
                await self._replay(refill, line_up)
        for action in self.core.send_again(trio.current_time()):
            if isinstance(action, Send):
                await self.send(action)
            else:
                self.apply([action])

    async def _replay(self, refill: Refill, line_up: LineUp) -> None:
        """Send the first hop its missing positions.  Raises PeerFault, which the core knows then."""
        for hop in refill.bulk:
            with self._noting(hop) as link:
                await link.begin_bulk(partial(self.swarm.open_stream, hop.hop.peer, PUSH_PROTOCOL))
                self._bulk.append(link)
        if refill.client_from == refill.position:
            return
        first, contract = refill.orders[0][0], line_up.contract
        note = self.core.route.replay_note("client", first.hop.peer, refill.client_from, refill.position)
        self.apply([note])
        part = min(REPLAY_TOKENS, contract.max_tokens)
        for start, stop, rope_length in self.journal.parts(refill.client_from, refill.position, part):
            kept = self.journal.read(start, stop, refill.step)
            body = recode(kept, self.core.terms.kept_codec, contract.codec, contract.hidden)
            step = Step(contract.session, 0, start, "replay", body, (), line_up.epoch, True, rope_length)
            with self._noting(first) as link:
                await link.send_step(step, self.limits.session_idle_seconds)

    async def _watch(self, hops: Sequence[HopState]) -> None:
        """During a replay, which may be delayed, ask every hop whether it lives."""
        while True:
            await trio.sleep(RELINK_SECONDS / 2)
            for hop in hops:  # shielded: a question that was cut short would take the stream with it
                with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                    await self.perform([Ask(hop)])
            await trio.sleep(RELINK_SECONDS / 2)
            self.tell(Unanswered(hops, RELINK_SECONDS))

    # --- streams ---

    def link(self, hop: HopState) -> HopLink:
        """The streams to a hop.  Raises PeerGone once they are closed."""
        if hop not in self._links:
            raise PeerGone(f"the stream to {hop.hop.peer} is closed")
        return self._links[hop]

    @contextlib.contextmanager
    def _noting(self, hop: HopState) -> Iterator[HopLink]:
        """A PeerFault within goes to the core, and on to the caller."""
        try:
            yield self.link(hop)
        except PeerFault as fault:
            self.tell(Lost(hop, fault))
            raise

    async def _listen(self, link: HopLink, task_status: trio.TaskStatus[None]) -> None:
        """Read a hop's frames until the session leaves it; then send a goodbye."""
        core, hop, contracts = self.core, link.state, self.core.route.contracts

        def is_saved(fault: PeerFault) -> bool:
            self.tell(Lost(hop, fault))
            return hop.alive

        def taken(frame: Buffer) -> bool:
            """An answer to the client itself, which takes no time; see `FramedStream.receive`."""
            if hop.near.relay or hop.hop.stop < core.terms.run.stop or not begins_result(frame):
                return False
            result = decode_from_hop(frame, contracts.current, contracts.in_epoch)
            if not isinstance(result, Result):
                return False
            self.apply(core.receive(Answered(hop, result), trio.current_time()))
            return True

        try:
            with link.scope:
                task_status.started()
                receive: Callable[[], Awaitable[Buffer | None]] = partial(link.stream.receive, taker=taken)
                if link.moves:
                    receive = partial(link.receive, is_saved, taken)
                while (frame := await receive()) is not None:
                    event: Event
                    match decode_from_hop(frame, contracts.current, contracts.in_epoch):
                        case Result() as result:
                            if hop.near.relay:  # the next hop would be the one to complain
                                contract = contracts.in_epoch(result.epoch)
                                check_finite(result.body, contract.codec, contract.hidden)
                            event = Answered(hop, result)
                        case Failed() as failed:
                            event = Reported(hop, failed)
                        case Here() as here:
                            event = Located(hop, here)
                        case Relinked() as relinked:
                            link.take_relinked(relinked)
                            continue
                    await self.perform(core.receive(event, trio.current_time()))
                self.tell(Lost(hop, PeerGone(f"{hop.hop.peer} ended the session")))
        except PeerFault as fault:
            self.tell(Lost(hop, fault))
        finally:
            hop.close()  # it may have been cancelled before it could begin
            if link.shared is not None:
                link.shared.leave()
            await link.say_goodbye()
            del self._links[hop]
            self.wake()


def seconds_to_open(route: Route, place: Place, seconds: float) -> float:
    """The time to open a hop.  seconds: without what it gets first."""
    if (prompts := route.core.terms.prompts) is not None:
        seconds += prompts.seconds_for(place.hop.blocks, route.limits)
    if (adapter := route.core.terms.adapter) is not None:
        seconds += adapter.seconds_for(place.hop.peer, place.hop.blocks)
    return seconds


def shared_stream(swarm: SwarmAccess, hop: Hop) -> SharedStream | None:
    """The stream to a hop's peer that sessions share; None where the peer takes none."""
    (terms,) = swarm.terms_of([hop])
    return swarm.of_sessions.shared.of(hop.peer) if terms is not None and terms.batches else None


def share(route: Route, link: HopLink, shared: SharedStream) -> None:
    """Let a session share the stream to a hop's peer with others."""
    core, hop = route.core, link.state

    def take(result: Result) -> None:
        try:
            if hop.near.relay or hop.hop.stop < core.terms.run.stop:
                raise RemoteProtocolError(f"a result of {hop.hop.peer}, which is not the last hop")
            check_result(result, core.route.contracts.in_epoch(result.epoch))
            route.apply(core.receive(Answered(hop, result), trio.current_time()))
        except PeerFault as fault:
            lost(fault)

    def lost(fault: PeerFault) -> None:
        if core.steps.sent or not isinstance(fault, PeerGone):
            route.tell(Lost(hop, fault))
            link.scope.cancel()

    at_an_end = hop.near.predecessor is None or hop.near.successor is None
    member = Membership(shared, core.route.contracts.current.session, take, lost, at_an_end)
    open_push = partial(route.swarm.open_stream, hop.hop.peer, PUSH_PROTOCOL)
    link.share(member)
    shared.join(member, route.nursery, open_push)


def is_free(route: Route) -> bool:
    """Whether the first hop takes a short step without a wait."""
    hops = route.core.route.hops
    link = route._links.get(hops[0]) if hops else None
    return link is not None and link.stream.is_free and not route._bulk
