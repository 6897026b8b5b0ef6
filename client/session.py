"""One session along one chain: hidden states in at the first hop, out of the last.

The client opens a stream to every hop.  It sends steps to the first one; the hops push them on
among themselves and the last one answers.  The streams to the hops between carry only bad news.
Where two hops cannot reach each other the session runs in relay mode: the client carries the
hidden states from hop to hop itself.

A session never repairs itself: the first fault ends it, and `client.retry` makes a new one.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio
from torch import Tensor

from node.compute import ComputeThread
from node.network.streams import FramedStream
from routing.chain import Chain
from routing.names import PeerId
from tensor_codec.compression import decode_hidden, encode_hidden
from tensor_codec.errors import (
    BadResult,
    MessageError,
    PeerFault,
    PeerGone,
    Refused,
    RemoteProtocolError,
    SlowPeer,
)
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages import (
    SESSION_ID_BYTES,
    Contract,
    Failed,
    Open,
    Reply,
    Result,
    Step,
    StepRange,
    decode_from_hop,
    decode_open_reply,
    encode_close,
    encode_open,
    encode_step,
)

OpenStream = Callable[[PeerId], Awaitable[FramedStream]]


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session asks of every hop.

    dtypes: what each peer of the chain computes in.  codec: how hidden states travel.
    """

    model: str
    revision: str
    hidden: int
    batch: int
    max_length: int
    dtypes: dict[PeerId, str]
    codec: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of one step went, in seconds.

    hops: for each hop in the chain's order, how long it held the step and how long it computed.
    """

    total: float
    hops: tuple[tuple[float, float], ...]

    @property
    def network(self) -> float:
        """The part in which no hop held the step: the wire, and this process."""
        return self.total - sum(held for held, _ in self.hops)


@dataclass(slots=True)
class Pending:
    """A step on its way.

    timings: of the hops that have answered, in relay mode.  deadline: on trio's clock, from when its
    answer is waited for.
    """

    step: int
    what: StepRange
    began: float = field(default_factory=time.perf_counter)
    key: tuple[int, int] = (0, 0)  # (hop that answers, step)
    here: trio.Event = field(default_factory=trio.Event)
    result: Result | None = None
    timings: tuple[tuple[int, int], ...] = ()
    deadline: float = math.inf


@dataclass(slots=True)
class Session:
    """An open session.  Made by `open_session`; its tasks run in the swarm's nursery.

    length: positions in the hops' caches, as far as answers have come back.
    """

    chain: Chain
    terms: Terms
    relay: bool
    step_seconds: float
    compute: ComputeThread
    length: int = 0
    times: StepTimes | None = None  # of the last step
    last_tokens: int = 0  # in the last step
    error: PeerFault | Refused | None = None
    _contract: Contract = field(init=False)
    _streams: list[FramedStream] = field(default_factory=list)
    _answers: dict[tuple[int, int], Pending] = field(default_factory=dict)  # by (hop, step)
    _next_step: int = 0
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _closed: trio.Event = field(default_factory=trio.Event)

    @property
    def max_step_tokens(self) -> int:
        """Positions that one step may carry; longer inputs go in chunks."""
        return self._contract.max_tokens

    def encode(self, hidden: Tensor) -> Buffer:
        """Hidden states [batch, tokens, hidden] as a step's body.  Raises BadResult for NaN."""
        return encode_hidden(hidden, self.terms.codec)

    def decode(self, result: Result) -> Tensor:
        """The hidden states [batch, tokens, hidden] of an answer, in the codec's dtype.  Raises BadResult."""
        try:
            return decode_hidden(result.body, self._contract)
        except BadResult as error:
            error.peer = self.chain.hops[-1].peer
            raise

    async def step(self, hidden: Tensor, position: int | None = None, reply: Reply = "all") -> Tensor | None:
        """Run hidden states [batch, tokens, hidden] through the chain.

        position: of the first token; default: behind what the caches hold; lower cuts them there.
        reply: positions to get back ("all", "last", or "none": returns None).
        Returns hidden states [batch, tokens or 1, hidden] before the final norm, in the codec's
        dtype.  Raises PeerFault or Refused, with `peer`; the session is over then.
        """
        begin = self.length if position is None else position
        body = await self.compute.run(self.encode, hidden)
        result = await self.exchange(body, begin, int(hidden.shape[1]), reply)
        return await self.compute.run(self.decode, result) if reply != "none" else None

    async def exchange(self, body: Buffer, position: int, tokens: int, reply: Reply) -> Result:
        """Send one encoded step and return the answer to it.  Raises PeerFault or Refused."""
        return await self.collect(await self.submit(body, position, tokens, reply))

    async def submit(self, body: Buffer, position: int, tokens: int, reply: Reply) -> Pending:
        """Send one encoded step; `collect` waits for the answer.  Raises PeerFault or Refused.

        Several may be on their way (`Limits.max_steps_in_flight`): hops then work on different
        ones at the same time.  In relay mode there is only ever one.
        """
        pending = Pending(self._next_step, StepRange(position, tokens, reply))
        self._next_step += 1
        if self.relay:
            with self._deadline(pending):
                await self._carry(pending, body)
        else:
            await self._send(0, len(self._streams) - 1, pending, body)
        return pending

    async def collect(self, pending: Pending) -> Result:
        """The answer to a submitted step.  Raises PeerFault or Refused."""
        with self._deadline(pending):
            result = await self._answer(pending)
        self.length = pending.what.position + pending.what.tokens
        self.last_tokens = pending.what.tokens
        self.times = StepTimes(
            time.perf_counter() - pending.began,
            tuple((held / 1e6, computing / 1e6) for held, computing in pending.timings + result.timings),
        )
        return result

    def close(self) -> None:
        """End the session: its task says goodbye to the hops and closes the streams."""
        self._scope.cancel()

    async def aclose(self) -> None:
        """The same, and wait until the streams are closed."""
        self.close()
        await self._closed.wait()

    @contextmanager
    def _deadline(self, pending: Pending) -> Iterator[None]:
        pending.deadline = min(pending.deadline, trio.current_time() + self.step_seconds)
        try:
            with trio.fail_at(pending.deadline):
                yield
        except trio.TooSlowError:
            late = SlowPeer(f"no answer to step {pending.step} within {self.step_seconds} s")
            raise self._fail(late, self._slowest(pending)) from None

    def _slowest(self, pending: Pending) -> str | None:
        """Whom to blame for silence: the hop that has the step, where that is known."""
        known = self.relay or len(self.chain.hops) == 1
        return self.chain.hops[pending.key[0]].peer if known else None

    async def _carry(self, pending: Pending, body: Buffer) -> None:
        """Relay mode: take the hidden states from hop to hop, up to the last one."""
        last = len(self._streams) - 1
        for hop in range(last):
            here = Pending(pending.step, StepRange(pending.what.position, pending.what.tokens, "all"))
            pending.key = (hop, pending.step)
            await self._send(hop, hop, here, body)
            result = await self._answer(here)
            pending.timings += result.timings
            body = result.body
        await self._send(last, last, pending, body)

    async def _send(self, to: int, answerer: int, pending: Pending, body: Buffer) -> None:
        """Send a step to hop `to`, to which hop `answerer` will have the answer."""
        if self.error is not None:
            raise self.error
        pending.key = (answerer, pending.step)
        self._answers[pending.key] = pending
        what = pending.what
        message = Step(self._contract.session, pending.step, what.position, what.reply, body)
        try:
            await self._streams[to].send(encode_step(message))
        except PeerFault as fault:
            raise self._fail(fault, self.chain.hops[to].peer) from None

    async def _answer(self, pending: Pending) -> Result:
        try:
            await pending.here.wait()
        finally:
            self._answers.pop(pending.key, None)
        if pending.result is None:
            raise self.error or PeerGone("the session was closed")
        return pending.result

    def _fail(self, error: PeerFault | Refused, peer: str | None) -> PeerFault | Refused:
        """Record the first fault, wake everyone who waits, and return it."""
        if self.error is None:
            if error.peer is None:
                error.peer = peer
            self.error = error
        for answer in self._answers.values():
            answer.here.set()
        return self.error

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        """Read what the hops say until the session is closed; then close the streams."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for index in range(len(self._streams)):
                        nursery.start_soon(self._listen, index)
                    task_status.started()
        finally:
            self._fail(PeerGone("the session was closed"), None)
            await _say_goodbye(self._streams)
            self._closed.set()

    async def _listen(self, index: int) -> None:
        hop = self.chain.hops[index]
        try:
            while (frame := await self._streams[index].receive()) is not None:
                message = decode_from_hop(frame, self._contract)
                if isinstance(message, Failed):
                    self._fail(message.error(), message.peer or hop.peer)
                else:
                    self._take(index, message)
            self._fail(PeerGone(f"{hop.peer} ended the session"), hop.peer)
        except PeerFault as fault:
            self._fail(fault, hop.peer)

    def _take(self, index: int, result: Result) -> None:
        answer = self._answers.get((index, result.step))
        if answer is None:
            return  # nobody waits for it any more
        tokens = len(result.body) // self._contract.row_bytes
        if (result.position, tokens) != (answer.what.reply_position, answer.what.reply_tokens):
            raise MessageError(
                f"{tokens} positions from {result.position} on came back,"
                f" {answer.what.reply_tokens} from {answer.what.reply_position} on were asked for"
            )
        answer.result = result
        answer.here.set()


async def open_session(
    chain: Chain,
    terms: Terms,
    *,
    open_stream: OpenStream,
    nursery: trio.Nursery,
    compute: ComputeThread,
    limits: Limits,
    step_seconds: float = 30.0,
    relay: bool = False,
) -> Session:
    """Open a session at every hop of `chain`, at all of them at once.

    nursery: where the session's task runs until `close`.  relay: carry the hidden states from hop
    to hop here; chosen by itself where a hop cannot reach the next one.
    Raises PeerFault or Refused, with `peer`.
    """
    session = Session(chain, terms, relay, step_seconds, compute)
    session_id = secrets.token_bytes(SESSION_ID_BYTES)
    session._contract = Contract(
        session=session_id,
        start=0,
        stop=chain.hops[-1].stop,
        batch=terms.batch,
        max_length=terms.max_length,
        hidden=terms.hidden,
        codec=terms.codec,
        max_step_tokens=limits.max_step_tokens,
    )
    opening = _Opening(session, session_id, open_stream, limits)
    try:
        pushes = await opening.all_hops()
    except BaseException:
        with trio.CancelScope(shield=True):
            await _say_goodbye(opening.streams)
        raise
    session._streams = opening.streams
    if not relay and not all(pushes[:-1]):
        await _say_goodbye(opening.streams)
        return await open_session(
            chain, terms, open_stream=open_stream, nursery=nursery, compute=compute,
            limits=limits, step_seconds=step_seconds, relay=True,
        )  # fmt: skip
    await nursery.start(session._run)
    return session


@dataclass(slots=True)
class _Opening:
    """Opens the streams of a session, all at once; the first failure cancels the rest."""

    session: Session
    session_id: bytes
    open_stream: OpenStream
    limits: Limits
    made: dict[int, FramedStream] = field(default_factory=dict)
    error: PeerFault | Refused | None = None

    @property
    def streams(self) -> list[FramedStream]:
        return [self.made[index] for index in sorted(self.made)]

    async def all_hops(self) -> list[bool]:
        """Whether each hop can push to its successor.  Raises PeerFault, Refused."""
        hops = self.session.chain.hops
        pushes = [False] * len(hops)

        async def one(index: int) -> None:
            try:
                pushes[index] = await self._open(index)
            except (PeerFault, Refused) as error:
                error.peer = error.peer or hops[index].peer
                self.error = self.error or error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for index in range(len(hops)):
                nursery.start_soon(one, index)
        if self.error is not None:
            raise self.error
        return pushes

    async def _open(self, index: int) -> bool:
        hops, terms, relay = self.session.chain.hops, self.session.terms, self.session.relay
        hop = hops[index]
        stream = await self.open_stream(hop.peer)
        self.made[index] = stream
        await stream.send(
            encode_open(
                Open(
                    session=self.session_id,
                    model=terms.model,
                    revision=terms.revision,
                    start=hop.start,
                    stop=hop.stop,
                    batch=terms.batch,
                    max_length=terms.max_length,
                    dtype=terms.dtypes[hop.peer],
                    codec=terms.codec,
                    predecessor=hops[index - 1].peer if index and not relay else None,
                    successor=hops[index + 1].peer if index + 1 < len(hops) and not relay else None,
                )
            )
        )
        # The hop dials its successor before it answers.
        frame = await stream.receive(self.limits.dial_seconds + self.limits.frame_start_seconds)
        if frame is None:
            raise RemoteProtocolError(f"{hop.peer} closed the stream instead of answering")
        reply = decode_open_reply(frame)
        if isinstance(reply, Failed):
            raise reply.error()
        return reply.push


async def _say_goodbye(streams: list[FramedStream]) -> None:
    """Tell the hops that the session is over and close the streams.  Bounded by a second."""
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(_goodbye, stream)


async def _goodbye(stream: FramedStream) -> None:
    try:
        await stream.send(encode_close())
        await stream.aclose()
    except PeerFault:
        await stream.reset()
