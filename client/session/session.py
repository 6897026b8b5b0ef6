"""One session: hidden states in at the first block, out of the last, whatever happens to the hops.

The client opens a stream to every hop.  It sends steps to the first one; the hops push them on
among themselves and the last one answers.  The streams to the hops between carry orders and bad
news.  Where two hops cannot reach each other the client carries what goes from one to the other.

When a hop fails, `collect` (or the next `submit`) has the route repaired (`client.session.route`) and
goes on: steps without an answer are sent again, and a hop that has computed one answers from memory.  A step
that is late is looked after: every hop is asked how far it is, and one that says nothing is taken for
dead.  Between steps the session leaves hops that are about to go or have become slow.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from torch import Tensor

from client.session.hop_link import HopLink
from client.session.lost_time import REPLAYED_SHARE, LostTime
from client.session.replay_plan import Sent
from client.session.route import Route, Stand, Surroundings, Terms
from client.session.steps import Pending, StepTimes
from client.session.trace import Trace
from node.runtime import values
from node.runtime.compute_thread import ComputeThread
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.codecs import decode_hidden, encode_hidden, recode
from tensor_codec.errors import BadResult, MessageError, PeerFault, PeerGone, Refused, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.limits import KIB, Limits
from tensor_codec.messages.contract import (
    CODEC_BYTES,
    REPLAY_TOKENS,
    SESSION_ID_BYTES,
    Contract,
    Reply,
    StepRange,
)
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import Result, Step, decode_from_hop

BULK_BYTES = 16 * KIB  # a step with more takes a stream of its own from hop to hop
MIN_HOP_SECONDS = 1.0  # a hop's deadline is 4 x p95 of its recent steps, within these two
MAX_HOP_SECONDS = 30.0
DEADLINE_FACTOR = 4.0
ASK_AT = 0.25  # of the deadline: then every hop is asked how far it is
BETTER = 0.6  # of the present chain's seconds: then it is worth a move
LOOKS_SHARE = 0.05  # of the time may go into looking for a better chain
MIN_GAIN_SECONDS = 0.01  # a step: less is noise
REST_SECONDS = 5.0  # after a move, before another one
STEPS_AHEAD = 32  # so many, it is assumed, will still come: their gain has to pay for the replay
SEEN_STEPS = 3  # of a hop, whose median is what it is now
LONG_PART = 2048  # positions: what a caller waits for one step is enough to fill caches with so many


@dataclass(slots=True, eq=False)
class Session:
    """A session.  Made by `open_session`; its tasks run in the swarm's nursery until `close`.

    length: positions in the hops' caches, as far as answers have come back.
    give_up_seconds: how long one call may take, repairs included, where it does not say.
    """

    terms: Terms
    around: Surroundings
    nursery: trio.Nursery
    compute: ComputeThread
    limits: Limits
    give_up_seconds: float = 120.0
    trace: Trace = field(default_factory=Trace)
    length: int = 0
    times: StepTimes | None = None  # of the last step
    route: Route = field(init=False)
    _journal: Journal = field(init=False)
    _next_step: int = 0
    _pending: dict[int, Pending] = field(default_factory=dict)  # by step, oldest first
    _sent: list[Sent] = field(default_factory=list)  # without an answer
    _again: list[Pending] = field(default_factory=list)  # to be sent when the route has changed
    _lost_time: LostTime = field(default_factory=LostTime)
    _seen: dict[PeerId, deque[float]] = field(default_factory=dict)  # seconds per block
    _silences: Counter[PeerId] = field(default_factory=Counter)
    _look_at: float = 0.0  # trio.current_time(): not before this for a better chain

    def __post_init__(self) -> None:
        terms = self.terms
        contract = Contract(
            session=secrets.token_bytes(SESSION_ID_BYTES),
            start=0,
            stop=terms.blocks,
            batch=terms.batch,
            max_length=terms.max_length,
            hidden=terms.hidden,
            codec=terms.kept_codec,
            max_step_tokens=self.limits.step_tokens(terms.hidden * CODEC_BYTES[terms.kept_codec]),
        )
        self._journal = Journal(terms.batch, contract.row_bytes, terms.max_length)
        self.route = Route(
            terms, contract, self.around, self, self._journal, self.nursery, self.limits, self.trace
        )

    @property
    def _contract(self) -> Contract:
        return self.route.contract

    @property
    def chain(self) -> Chain:
        """The hops that it runs along now."""
        return self.route.chain

    @property
    def relay(self) -> bool:
        """Whether the client carries hidden states between some of the hops."""
        return any(link.relay for link in self.route.hops)

    @property
    def well(self) -> tuple[Hop, ...]:
        """The hops of which nothing bad is known."""
        return tuple(link.hop for link in self.route.hops if link.alive and not link.refused)

    @property
    def max_step_tokens(self) -> int:
        """Positions that one step may carry; longer inputs go in chunks."""
        return self._contract.max_tokens

    def encode(self, hidden: Tensor) -> Buffer:
        """Hidden states [batch, tokens, hidden] as `submit` takes them.  Raises BadResult for NaN.

        They are narrowed to what travels when they are sent, since the hops may be others by then.
        """
        kept, now = self.terms.kept_codec, self._contract.codec
        if now != kept:
            encode_hidden(hidden, now)  # raises for what is beyond its range
        return encode_hidden(hidden, kept)

    def decode(self, result: Result) -> Tensor:
        """The hidden states [batch, tokens, hidden] of an answer, in the codec's dtype.  Raises BadResult."""
        try:
            return decode_hidden(result.body, self.route.contract_in(result.epoch))
        except BadResult as error:
            error.peer = self.chain.hops[-1].peer
            raise

    def distrust(self, error: BadResult) -> None:
        """The last hop answered with what cannot be right (see `decode`): it is to be replaced."""
        for link in self.route.hops:
            if link.hop.peer == error.peer:
                self.route.fail(link, error)

    async def step(
        self,
        hidden: Tensor,
        position: int | None = None,
        reply: Reply = "all",
        *,
        seconds: float | None = None,
        rope_length: int | None = None,
    ) -> Tensor | None:
        """Run hidden states [batch, tokens, hidden] through the chain.

        position: of the first token; default: behind what the caches hold; lower cuts them there.
        reply: positions to get back ("all", "last", or "none": returns None).
        seconds: that it may take, repairs included; default: `give_up_seconds`, and while caches of many
        positions are filled again as many more for every LONG_PART of them.
        rope_length: positions of the whole prompt, where it comes in several steps and the model's rotary
        angles depend on its length; default: up to the end of this step.
        Returns hidden states [batch, tokens or 1, hidden] before the final norm, in the codec's
        dtype.  A hop that fails is replaced, and the step goes on.  Raises NoChain, PeerFault or
        Refused when the time is up; the session may be used again, from `length` on.
        """
        self._check_step(hidden, position, reply, seconds)
        begin = self.length if position is None else position
        deadline = trio.current_time() + (self.give_up_seconds if seconds is None else seconds)
        until = deadline + self.give_up_seconds * long_parts(begin) if seconds is None else deadline
        body = await self.compute.run(self.encode, hidden)
        tokens = int(hidden.shape[1])
        whole = begin + tokens if rope_length is None else rope_length
        pending = await self.submit(body, begin, tokens, reply, deadline=deadline, rope_length=whole)
        result = await self.collect(pending, deadline=deadline, until=until)
        if reply == "none":
            return None
        try:
            return await self.compute.run(self.decode, result)
        except BadResult as error:
            self.distrust(error)
            raise

    def _check_step(self, hidden: Any, position: Any, reply: Any, seconds: Any) -> None:  # Any: to be checked
        """Raises ValueError for what no server would take."""
        rows, size = self.terms.batch, self.terms.hidden
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            raise ValueError(f"hidden is {values.shown(hidden)}, a tensor of floats is needed")
        shape = tuple(hidden.shape)
        if len(shape) != 3 or shape[0] != rows or not shape[1] or shape[2] != size:
            raise ValueError(f"hidden is {list(shape)}, [{rows}, tokens, {size}] is needed")
        if position is not None:
            values.whole("position", position, 0)
        if reply not in ("all", "last", "none"):
            raise ValueError(f"reply is {values.shown(reply)}, all, last or none is allowed")
        if seconds is not None:
            values.seconds("seconds", seconds)

    async def submit(
        self,
        body: Buffer,
        position: int,
        tokens: int,
        reply: Reply,
        *,
        deadline: float | None = None,
        rope_length: int = 0,
    ) -> Pending:
        """Send one encoded step; `collect` waits for the answer.

        Several may be on their way (`Limits.max_steps_in_flight`): hops then work on different
        ones at the same time.  rope_length: see `StepRange`.  Raises as `step`.
        """
        deadline = trio.current_time() + self.give_up_seconds if deadline is None else deadline
        if not 0 < tokens <= self.max_step_tokens or position + tokens > self.terms.max_length:
            raise ValueError(
                f"{tokens} positions from {position} on, {self.max_step_tokens} a step and"
                f" {self.terms.max_length} in all are allowed"
            )
        if not 0 <= rope_length <= self.terms.max_length:
            raise ValueError(f"a rope_length of {rope_length}, 0 to {self.terms.max_length} are allowed")
        if self.terms.rope is None or rope_length <= position + 1:
            rope_length = 0  # nothing depends on it
        if not self._pending:
            await self._between_steps(position, deadline)
        elif position != self._journal.stop:
            raise ValueError(
                f"a step from position {position} on, others up to {self._journal.stop} are on their way"
            )
        self._journal.append(position, tokens, body, rope_length)
        size = tokens * self._contract.row_bytes
        bulk = next((p.bulk for p in self._pending.values()), size > BULK_BYTES)
        pending = Pending(self._next_step, StepRange(position, tokens, reply, rope_length), body, bulk)
        self._next_step += 1
        self._pending[pending.step] = pending
        self._sent.append(Sent(pending.step, pending.what))
        if self.route.broken_at is None:
            with contextlib.suppress(PeerFault):  # noted; `collect` repairs it
                await self._dispatch(pending)
        return pending

    async def collect(
        self, pending: Pending, *, deadline: float | None = None, until: float | None = None
    ) -> Result:
        """The answer to a submitted step.  Raises as `step`.

        until: as long as a replay that the step waits for gets on, the deadline moves, to here at most.
        """
        deadline = trio.current_time() + self.give_up_seconds if deadline is None else deadline
        try:
            while pending.result is None:
                if until is not None:
                    deadline = max(deadline, min(pending.refilled_at + self.give_up_seconds, until))
                if self.route.closed:
                    raise PeerGone("the session was closed")
                if pending.given_up:
                    raise SlowPeer(f"step {pending.step} was given up with one before it")
                if self.route.broken_at is not None:
                    await self.route.repair(deadline)
                    continue
                await self._wait(pending, deadline)
        except BaseException:
            self.give_up_steps()
            raise
        self._pending.pop(pending.step, None)
        self._take_in(pending, pending.result)
        return pending.result

    def give_up_steps(self) -> None:
        """Nobody will collect the steps on their way: what is left of them must not meet later ones."""
        given_up = [pending for pending in self._pending.values() if pending.result is None]
        self._pending.clear()
        for pending in given_up:
            pending.given_up = True
        if given_up and not self.route.closed:
            self.route.break_off("steps were given up")

    def close(self) -> None:
        """End the session: its tasks say goodbye to the hops and close the streams."""
        self.route.close()

    async def aclose(self) -> None:
        """The same, and wait until the streams are closed."""
        self.route.close()
        await self.route.wait_closed()

    # --- answers ---

    def _take_in(self, pending: Pending, result: Result) -> None:
        """What an answer shows."""
        what, self.route.last_error = pending.what, None
        self.length = what.position + what.tokens
        if result.epoch == self.route.epoch and not self._pending:
            self.route.behind_replay = False
        self._sent = [one for one in self._sent if one.step > pending.step]
        self.times = StepTimes(
            trio.current_time() - pending.began,
            tuple((held / 1e6, computing / 1e6) for held, computing in pending.timings + result.timings),
        )
        if self.route.resumed is not None and self.route.broken_at is None:
            now, (resumed, broken) = trio.current_time(), self.route.resumed
            self.trace.add("recovered", seconds=now - broken, replay_seconds=now - resumed)
            self.route.resumed = None
        elif what.tokens == 1:
            self._lost_time.took(self.times.total, self.chain.expected_seconds)
            for link, (held, _) in zip(self.route.hops, self.times.hops, strict=False):
                seen = self._seen.setdefault(link.hop.peer, deque(maxlen=SEEN_STEPS))
                seen.append(held / (link.hop.stop - link.hop.start))
            if self.terms.batch == 1 and not self._pending:  # else they waited for each other
                took = self.times
                self.around.learn(self.chain.hops, [held for held, _ in took.hops], took.total)
        self.trace.add(
            "step",
            step=pending.step,
            position=what.position,
            tokens=what.tokens,
            seconds=self.times.total,
            hops=self.times.hops,
            sent=what.tokens * self._contract.row_bytes,
            received=len(result.body),
        )

    async def _wait(self, pending: Pending, deadline: float) -> None:
        """Until there is news, or it is time to look after the step.  Raises SlowPeer at the deadline."""
        news = self.route.news
        first = pending is next(iter(self._pending.values()), None)
        with trio.move_on_at(min(deadline, pending.look_at if first else math.inf)):
            await news.wait()
            return
        if trio.current_time() >= deadline:
            raise SlowPeer(f"no answer to step {pending.step} by the caller's deadline")
        await self._look_after(pending)

    def _hop_seconds(self) -> float:
        """How long a hop may be silent."""
        recent = self._lost_time.recent
        if not recent:
            return MIN_HOP_SECONDS
        p95 = sorted(recent)[int(0.95 * (len(recent) - 1))]
        return min(max(DEADLINE_FACTOR * p95, MIN_HOP_SECONDS), MAX_HOP_SECONDS)

    async def _look_after(self, pending: Pending) -> None:
        """A step is late: ask every hop how far it is; who is silent until the deadline has failed."""
        now, seconds = trio.current_time(), self._hop_seconds()
        if not pending.asked:
            pending.asked = True
            pending.look_at = max(pending.since + seconds, now + (1 - ASK_AT) * seconds)
            for link in self.route.hops:
                with contextlib.suppress(PeerFault):
                    await link.ask()
            return
        asked = [link for link in self.route.hops if link.asked_at is not None]
        silent = [link for link in asked if now - (link.asked_at or now) >= 0.99 * self._may_be_silent(link)]
        for link in silent:
            self._silences[link.hop.peer] += 1
            quiet = f"{link.hop.peer} has said nothing for {now - pending.since:.2g} s"
            self.route.fail(link, SlowPeer(quiet))
        if asked and not silent:
            pending.look_at = now + seconds / 2
            return
        if not asked:
            self._find_the_step(pending, now)
        self._look_later(pending, now)

    def _may_be_silent(self, link: HopLink) -> float:
        """Seconds from when a hop was asked; twice as many after each time that it was given up for it.

        Who is far away over a bad line would else never be heard out, where there is nobody else.
        """
        times: int = 2 ** min(self._silences[link.hop.peer], 5)
        return min((1 - ASK_AT) * self._hop_seconds() * times, MAX_HOP_SECONDS)

    def _look_later(self, pending: Pending, now: float) -> None:
        pending.since, pending.asked = now, False
        pending.look_at = now + self._hop_seconds() * ASK_AT

    def _find_the_step(self, pending: Pending, now: float) -> None:
        """All hops live: patience while a late step gets on or waits its turn; else it was lost."""
        heard = (link.here for link in self.route.hops if link.here is not None)
        progress = tuple((here.length, here.step) for here in heard)
        if progress != pending.progress:
            if pending.progress and self.route.behind_replay:
                pending.refilled_at = now
            pending.progress, pending.moved_at = progress, now
            return
        link = self.route.hops[min(self._place_of(pending), len(self.route.hops) - 1)]
        busy = link.here is not None and link.here.waiting > 0
        waited = now - pending.moved_at
        why = f"step {pending.step} has not got on for {waited:.2g} s"
        if not busy or waited > MAX_HOP_SECONDS:
            self.route.fail(link, SlowPeer(why))
        elif waited > self._patience(pending):
            self.route.leave(link, why)

    def _patience(self, pending: Pending) -> float:
        """How long a hop may be busy with one thing before another one is looked for, in seconds."""
        usual = self._lost_time.usual() or self.chain.expected_seconds
        positions = pending.what.tokens
        if self.route.behind_replay:
            positions = max(positions, min(REPLAY_TOKENS, pending.what.position))
        seconds = DEADLINE_FACTOR * usual * (1 + REPLAYED_SHARE * (positions - 1))
        return min(max(seconds, self._hop_seconds()), MAX_HOP_SECONDS)

    def _place_of(self, pending: Pending) -> int:
        """The first hop that has not computed a step, by what the hops have said."""
        for index, link in enumerate(self.route.hops):
            if link.here is None or link.here.step is None or link.here.step < pending.step:
                return index
        return len(self.route.hops)

    # --- sending ---

    async def _dispatch(self, pending: Pending) -> None:
        """Send a step to the first hop.  Raises PeerFault, which is noted."""
        what, now = pending.what, trio.current_time()
        pending.timings, pending.progress, pending.moved_at = (), (), now
        self._look_later(pending, now)
        message = Step(
            self._contract.session,
            pending.step,
            what.position,
            what.reply,
            recode(pending.body, self.terms.kept_codec, self._contract.codec),
            epoch=self.route.epoch,
            bulk=pending.bulk or self.route.behind_replay,
            rope_length=what.rope_length,
        )
        await self.route.send(message)

    async def _between_steps(self, position: int, deadline: float) -> None:
        """Nothing is on its way: the time for repairs and for moves.  Raises as `step`."""
        route = self.route
        if position < self.length:
            self.length = position
            if position and not all(link.standing.cut for link in route.hops):
                route.break_off("going back")  # which these caches cannot: they are filled again
        self._journal.cut(position)
        if route.broken_at is not None:
            return await route.repair(deadline)
        await route.calm_down()
        if any(link.leaving for link in route.hops):
            await route.move("draining", deadline)
        elif self._is_slow():
            await route.move("slow", deadline)

    # --- for the route (`client.session.route.Feeder`) ---

    def stand(self) -> Stand:
        """See Feeder."""
        self._again = [pending for pending in self._pending.values() if pending.result is None]
        position = self._again[0].what.position if self._again else self.length
        return Stand(position, self._sent, [pending.step for pending in self._again])

    async def send_again(self) -> None:
        """See Feeder.  What has been answered meanwhile goes out too: not every hop may have seen it."""
        for pending in self._again:
            await self._dispatch(pending)

    async def hear(self, link: HopLink, frame: Buffer) -> None:
        """See Feeder."""
        message = decode_from_hop(frame, self._contract, self.route.contract_in)
        match message:
            case Result():
                await self._answered(link, message)
            case Failed():
                self._bad_news(link, message)
            case _:
                link.heard(message)

    async def _answered(self, link: HopLink, result: Result) -> None:
        if link.hop.stop < self.terms.blocks:
            return await self._carry(link, result)
        pending = self._pending.get(result.step)
        if pending is None or result.replay or pending.result is not None:
            return  # nobody waits for it any more
        contract, what = self.route.contract_in(result.epoch), pending.what
        tokens = len(result.body) // contract.row_bytes
        if (result.position, tokens) != (what.reply_position, what.reply_tokens):
            raise MessageError(
                f"{tokens} positions from {result.position} on came back,"
                f" {what.reply_tokens} from {what.reply_position} on were asked for"
            )
        pending.result = result
        self.route.tell()

    async def _carry(self, link: HopLink, result: Result) -> None:
        """Take what a hop made to the next one, which it cannot reach."""
        if result.epoch != self.route.epoch or link not in self.route.hops or not len(result.body):
            return
        pending = self._pending.get(result.step) if not result.replay else None
        reply: Reply = "replay" if result.replay else pending.what.reply if pending else "none"
        if pending is not None:
            pending.timings += result.timings
        step = Step(
            self._contract.session,
            result.step,
            result.position,
            reply,
            result.body,
            epoch=result.epoch,
            bulk=self.route.behind_replay or (pending is not None and pending.bulk),
            rope_length=result.rope_length if pending is None else pending.what.rope_length,
        )
        await self.route.carry(link, step)

    def _bad_news(self, link: HopLink, failed: Failed) -> None:
        """A hop says that something went wrong: here, or with a neighbour."""
        route, error = self.route, failed.error()
        peer = PeerId(failed.peer) if failed.peer is not None else None
        if failed.code == "leaving":
            link.leaving = True
        elif failed.code == "cannot_push" and peer is not None:
            route.out_of_reach(link, peer)
        elif isinstance(error, Refused) and failed.step is not None:
            route.refused(link, error)
        elif peer is not None and peer != link.hop.peer:
            for other in route.hops:
                if other.hop.peer == peer:
                    route.fail(other, error)
            ended = PeerGone(f"{link.hop.peer} ended the session for what {peer} did")
            route.fail(link, ended, blame=False)
        else:
            route.fail(link, error, blame=failed.code != "ended")

    # --- moves ---

    def _is_slow(self) -> bool:
        """Whether the chain has become slow and there is a much better one; marks the hops to be left."""
        began = trio.current_time()
        if began < self._look_at or not self._lost_time.too_much(self.length, len(self.chain.hops)):
            return False
        leave = self._worth_leaving()
        now = trio.current_time()
        self._look_at = now + (REST_SECONDS if leave else (now - began) / LOOKS_SHARE)
        if leave:
            self._lost_time.forget()
        for link in self.route.hops:
            link.leaving = link.leaving or link.hop in leave
        return bool(leave)

    def _worth_leaving(self) -> set[Hop]:
        """The hops without which the session would be so much faster that a replay pays."""
        seen = {peer: statistics.median(held) for peer, held in self._seen.items()}
        present = self.around.cost(self.chain.hops, seen)
        options = [(self._pays(hops, seconds, present), hops) for hops, seconds in self._others(seen)]
        pays, best = max(options, default=(0.0, self.chain.hops), key=lambda option: option[0])
        return set(self.chain.hops).difference(best) if pays > 0 else set()

    def _others(self, seen: dict[PeerId, float]) -> Iterator[tuple[tuple[Hop, ...], float]]:
        """Chains that might be better, with their seconds a step: the best one, and for each hop of ours
        the present one with others in its place, which has less to replay."""
        hops, tokens = self.chain.hops, self.terms.batch * self.terms.max_length
        choose = partial(self.around.choose, like=self.route.kinds, tokens=tokens, seen=seen)
        with contextlib.suppress(NoChain):
            best = choose(0, self.terms.blocks)
            yield best.hops, best.expected_seconds
        ours = frozenset(hop.peer for hop in hops)
        for index, hop in enumerate(hops):
            with contextlib.suppress(NoChain):
                instead = choose(hop.start, hop.stop, without=ours, beside=len(hops) - 1)
                chain = (*hops[:index], *instead.hops, *hops[index + 1 :])
                yield chain, self.around.cost(chain, seen)

    def _pays(self, hops: Sequence[Hop], seconds: float, present: float) -> float:
        """Seconds won by a change to a chain that takes so long a step, the replay paid; 0 for too few."""
        gain = present - seconds
        if gain < max(MIN_GAIN_SECONDS, (1 - BETTER) * present):
            return 0.0
        fresh = sum(hop.stop - hop.start for hop in hops if hop not in self.chain.hops)
        replay: float = self.length * REPLAYED_SHARE * seconds * fresh / self.terms.blocks
        return max(0.0, gain * STEPS_AHEAD - replay)


def long_parts(positions: int) -> int:
    """How many parts so many positions have that take time of their own to be filled again."""
    return positions // LONG_PART


async def open_session(
    terms: Terms,
    around: Surroundings,
    *,
    nursery: trio.Nursery,
    compute: ComputeThread,
    limits: Limits,
    give_up_seconds: float = 120.0,
    deadline: float | None = None,
    trace: Trace | None = None,
    chain: Chain | None = None,
) -> Session:
    """Open a session along the best chain, at all hops at once.

    chain: what to try first, where it has been chosen.
    nursery: where the session's tasks run until `close`.  deadline: on trio's clock.
    Raises NoChain, PeerFault, Refused when the deadline has passed.
    """
    session = Session(
        terms, around, nursery, compute, limits, give_up_seconds, trace if trace is not None else Trace()
    )
    session.route.first = chain
    try:
        await session.route.repair(trio.current_time() + give_up_seconds if deadline is None else deadline)
    except BaseException:
        session.close()
        raise
    return session
