"""Servers and clients of the simulation: the real code, over the simulated network and clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import trio
from torch import Tensor

from client.generation.conversation import Conversation
from client.session.session import Session
from client.swarm import Swarm
from node.model.adapters.low_rank import SpanAdapter
from node.network.streams import FramedStream
from routing.blocks import Blocks
from routing.chains.search import NoChain
from routing.names import PeerId
from routing.view.records import Record, State
from tensor_codec.errors import PeerFault, PeerGone, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.session import PUSH_PROTOCOL
from tests.fakes_lies import LyingNode
from tests.fakes_serving import PRIME, FakeArena, FakeCache, FakeSpan, generated, some_hidden
from tests.sim import glue
from tests.sim.directory import Directory, Gossip, numbered
from tests.sim.network import End, Host, Network
from tests.sim.plan import ClientPlan, Job, NodePlan, RowsJob, RowsStep

EPOCH = 1.7e9  # of wall clocks at the beginning
RTTS_ANNOUNCED = 6
T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """`time.perf_counter` of all participants.  ahead: by the compute of the function that runs just now."""

    ahead: float = 0.0

    def now(self) -> float:
        """Seconds."""
        return trio.current_time() + self.ahead


class Twice(AssertionError):
    """P2 is broken: a row of a cache was computed twice, or out of its turn."""


class CountingCache(FakeCache):
    """A cache that knows how often each of its rows was computed since it was cut there.

    sums: of each block's inputs up to each position, [batch, max_length, hidden].
    """

    def __init__(self, batch: int, max_length: int) -> None:
        super().__init__(batch, max_length)
        self.computed: Counter[tuple[int, int]] = Counter()  # by block and position
        self.sums: dict[int, Any] = {}  # Any: arrays of numpy, faster than tensors where they are tiny

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on."""
        super().cut(length)
        for key in [key for key in self.computed if key[1] >= length]:
            del self.computed[key]

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes the former row order[i]."""
        self.sums = {block: sums[list(order)] for block, sums in self.sums.items()}

    def add(self, block: int, hidden: Any) -> Any:
        """Take in the inputs from `length` on; the sum of all inputs before each of them."""
        if (sums := self.sums.get(block)) is None:
            sums = self.sums[block] = np.zeros((self.batch, self.max_length, hidden.shape[2]))
        begin, stop = self.length, self.length + hidden.shape[1]
        new = sums[:, begin:stop]
        hidden.cumsum(1, out=new)
        if begin:
            new += sums[:, begin - 1 : begin]
        return new - hidden

    def count(self, block: int, begin: int, stop: int) -> None:
        """These positions of a block are computed now.  Raises Twice."""
        for position in range(begin, stop):
            self.computed[block, position] += 1
            if self.computed[block, position] > 1:
                raise Twice(f"P2: position {position} of block {block} was computed twice")


class CountingArena(FakeArena):
    """Makes caches that count."""

    def open(self, batch: int, max_length: int) -> CountingCache:
        """An empty cache."""
        return CountingCache(batch, max_length)


class Span(FakeSpan):
    """Fake blocks that take time.  sick: answers NaN."""

    def __init__(self, start: int, stop: int, clock: Clock, seconds_per_block: float) -> None:
        super().__init__(start, stop)
        self.clock = clock
        self.seconds_per_block = seconds_per_block
        self.slow_by: list[float] = []  # of all that slows it down just now
        self.sick = False

    def forward(
        self,
        hidden: Tensor,
        cache: FakeCache,
        position: int,
        start: int,
        stop: int,
        *,
        rope_length: int = 0,
        prompts: Tensor | None = None,
        adapter: SpanAdapter | None = None,
    ) -> Tensor:
        """[batch, tokens, hidden] -> the same shape, as `FakeSpan.forward` without angles."""
        assert prompts is None, "no session here has any"
        assert adapter is None, "nor one of these"
        assert isinstance(cache, CountingCache)
        assert self.start <= start < stop <= self.stop
        if position != cache.length:
            raise Twice(f"P2: a step for position {position} of a cache that holds {cache.length}")
        tokens = hidden.shape[1]
        assert position + tokens <= cache.max_length
        values = hidden.to(torch.float64).numpy()
        for block in range(start, stop):
            cache.count(block, position, position + tokens)
            values = (3 * values + (block + 1) + cache.add(block, values)) % PRIME
        cache.length += tokens
        self.clock.ahead += self._seconds(tokens, stop - start)
        return torch.from_numpy(values).to(torch.float32) * (math.nan if self.sick else 1.0)

    def _seconds(self, tokens: int, blocks: int) -> float:
        return self.seconds_per_block * blocks * max(self.slow_by, default=1.0) * (1 + 0.05 * (tokens - 1))


class Compute:
    """Runs functions one at a time; their time passes after them, and while frozen nothing runs."""

    def __init__(self, clock: Clock, network: Network, me: PeerId) -> None:
        self._clock = clock
        self._network = network
        self._me = me
        self._lock = trio.Lock()
        self.busy_until = 0.0

    @property
    def is_idle(self) -> bool:
        """False: a function's time passes in `run` alone."""
        return False

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """function(*args)."""
        async with self._lock:
            await self._thaw()
            self._clock.ahead = 0.0
            try:
                return function(*args)
            finally:
                seconds, self._clock.ahead = self._clock.ahead, 0.0
                if seconds:
                    self.busy_until = trio.current_time() + seconds
                    await trio.sleep(seconds)
                    await self._thaw()

    async def _thaw(self) -> None:
        while (until := self._network.frozen_until(self._me)) > trio.current_time():  # noqa: ASYNC110
            await trio.sleep_until(until)  # it may be frozen for longer meanwhile


@dataclass(slots=True)
class World:
    """The parts that all participants share.  log: called with each event, for people."""

    blocks: int
    limits: Limits
    network: Network
    gossip: Gossip
    clock: Clock
    nursery: trio.Nursery
    log: Callable[[str], None]
    nodes: dict[PeerId, Node] = field(default_factory=dict)
    clients: dict[PeerId, Client] = field(default_factory=dict)


class Node:
    """A serving node, as `node.main` runs one.  It can be started again."""

    def __init__(self, plan: NodePlan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.peer = PeerId(plan.name)
        self.alive = False
        self.vanished = False
        self.skew_seconds = plan.skew_seconds
        self.host = Host(world.network, self.peer)
        self.directory = Directory(self.peer, world.network, self._overtaken)
        self.handlers = 0
        self._liar: tuple[LyingNode, trio.Event] | None = None
        self._seq = 0
        self._state: State | None = None  # announced, if anything
        world.network.participants[self.peer] = self
        world.gossip.directories[self.peer] = self.directory
        world.nodes[self.peer] = self

    @property
    def running(self) -> bool:
        """Whether its process is there and not frozen."""
        return self.alive and self.world.network.frozen_until(self.peer) <= trio.current_time()

    async def run(self, nursery: trio.Nursery) -> None:
        """Start the process; returns once it is online."""
        await nursery.start(self._process)

    async def _process(self, task_status: trio.TaskStatus[None]) -> None:
        world, plan = self.world, self.plan
        self.span = Span(plan.start, plan.stop, world.clock, plan.seconds_per_block)
        self.compute = Compute(world.clock, world.network, self.peer)
        self.listener = glue.make_listener(
            self.span,
            self.compute,
            CountingArena(),
            seconds_per_block=plan.seconds_per_block,
            budget_tokens=plan.tokens,
            limits=world.limits,
            open_stream=self._open_push,
        )
        self.directory.__init__(self.peer, world.network, self._overtaken)  # type: ignore[misc]  # an empty one
        self.alive, self.vanished = True, False
        self._seq = 0
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(self.listener.engine.run)
            nursery.start_soon(self._announce)
            world.gossip.meet(self.peer)
            self.say("online")
            task_status.started()

    def end(self, *, vanish: bool = False) -> None:
        """The process is gone at once (vanish: its host too, so that no kernel says so)."""
        if not self.alive:
            return
        self.alive, self.vanished, self._state = False, vanish, None
        self.world.network.gone(self.peer, vanished=vanish)
        self.nursery.cancel_scope.cancel()

    def say(self, state: State) -> None:
        """Announce."""
        self._state = state
        record = numbered(self._record(state), self._seq, EPOCH + trio.current_time() + self.skew_seconds)
        self._seq = record.seq
        self.world.gossip.say(record)

    def accept(self, end: End) -> None:
        """A stream comes in."""
        self.nursery.start_soon(self._serve, end)

    @contextmanager
    def lying(self, liar: LyingNode) -> Iterator[None]:
        """Within the context new streams are served by a liar; at its end those are reset."""
        over = trio.Event()
        self._liar = liar, over
        try:
            yield
        finally:
            self._liar = None
            over.set()

    async def _serve(self, end: End) -> None:
        """Handle a stream as `node.network.host` does."""
        network = self.world.network
        stream = FramedStream(end, end.peer, end.protocol, network.limits)
        self.handlers += 1
        try:
            await network.until_here(end)
            if self._liar is None:
                await glue.serve(self.listener, end.protocol, stream)
            else:
                await _serve_lies(*self._liar, stream)
            await stream.aclose()
        except PeerFault:
            end.reset_now()
        except BaseExceptionGroup as group:
            end.reset_now()
            others = group.split(PeerFault)[1]
            if others is not None:
                raise others from None
        except BaseException:
            end.reset_now()
            raise
        finally:
            self.handlers -= 1

    async def _open_push(self, peer: PeerId) -> FramedStream:
        record = self.directory.view().get(peer)
        if record is None:
            raise PeerGone(f"{peer} is not in our view of the swarm")
        return await self.host.open_stream(peer, record.addresses, PUSH_PROTOCOL)

    async def _announce(self) -> None:
        while True:
            await trio.sleep(self.world.limits.announce_seconds)
            self.listener.engine.rates.relax()
            if self._state is not None and self.running:
                self.say(self._state)

    def _overtaken(self, seq: int) -> None:
        """Others have a record of ours that says more than we did: our clock went back."""
        if seq > self._seq and self._state is not None:
            self._seq = seq
            self.say(self._state)

    def _record(self, state: State) -> Record:
        listener, network, plan = self.listener, self.world.network, self.plan
        others = [each for each in self.world.nodes.values() if each.plan.start <= plan.stop < each.plan.stop]
        rtt = {each.peer: 2 * network.way(self.peer, each.peer).delay for each in others[:RTTS_ANNOUNCED]}
        return Record(
            peer=self.peer,
            role="serve",
            state=state,
            model=glue.MODEL,
            revision=glue.REVISION,
            blocks=self.world.blocks,
            start=plan.start,
            stop=plan.stop,
            dtype=glue.DTYPE,
            seconds_per_block=listener.engine.rates.decode_seconds_per_block,
            prefill_seconds_per_token=listener.engine.rates.prefill_seconds_per_block_token,
            cache_tokens=listener.budget.free_tokens,
            queue=listener.engine.batcher.waiting,
            rtt=rtt,
            ttl_seconds=self.world.limits.record_ttl_seconds,
        )


async def _serve_lies(liar: LyingNode, over: trio.Event, stream: FramedStream) -> None:
    """Until the peer ends the stream, or the time of the lie is over.  Raises PeerFault, also in a group."""

    async def watch() -> None:
        await over.wait()
        raise PeerGone("the server tells the truth again")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await liar(stream)
        nursery.cancel_scope.cancel()


@dataclass(slots=True)
class Call:
    """One wait of a client for a token.  token or error: how it ended; neither: it was left."""

    client: str
    began: float
    ended: float
    token: int | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Story:
    """One generation: its request, and every call of it.  done: it ended by itself.

    run: of a session for hidden states; then the tokens are sums of its outputs.
    """

    client: ClientPlan
    prompt: tuple[int, ...]
    new_tokens: int
    run: Blocks | None = None
    calls: list[Call] = field(default_factory=list)
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """The tokens that came."""
        return [call.token for call in self.calls if call.token is not None]


@dataclass(slots=True)
class Applied:
    """A step of some rows that took place.  found: its answer."""

    position: int
    rows: tuple[int, ...] | None
    hidden: Tensor
    found: Tensor | None


@dataclass(slots=True)
class RowsStory:
    """One session of some rows: every step that took place, and every call."""

    client: ClientPlan
    job: RowsJob
    applied: list[Applied] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    done: bool = False


class Client:
    """A client process.  stories: of its generations.  progress: tokens that came, in all."""

    def __init__(self, plan: ClientPlan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.peer = PeerId(plan.name)
        self.alive = True
        self.vanished = False
        self.directory = Directory(self.peer, world.network, watches=True)
        self.stories: list[Story] = []
        self.rows_stories: list[RowsStory] = []
        self.conversations: list[Conversation] = []
        self.sessions: list[Session] = []
        self.progress = 0
        self.moved = trio.Event()
        self.finished = False
        self.swarm: Swarm
        world.network.participants[self.peer] = self
        world.gossip.directories[self.peer] = self.directory
        world.clients[self.peer] = self

    def accept(self, end: End) -> None:
        """No peer opens streams to a client."""
        raise AssertionError(f"{end.peer} dialled a client")

    async def run(self) -> None:
        """Do every job; returns when all have ended and the client has nothing left to do."""
        plan, world = self.plan, self.world
        with trio.CancelScope() as self.scope:
            async with trio.open_nursery() as self.nursery:
                self.swarm = glue.make_swarm(
                    Host(world.network, self.peer),
                    self.directory,
                    Compute(world.clock, world.network, self.peer),
                    self.nursery,
                    blocks=world.blocks,
                    limits=world.limits,
                    times=glue.ClientTimes(
                        plan.wait_seconds, plan.step_seconds, plan.give_up_seconds, plan.standby
                    ),
                )
                world.gossip.meet(self.peer)
                async with trio.open_nursery() as jobs:
                    for job in plan.jobs:
                        jobs.start_soon(self._job, job)
                    for rows_job in plan.rows_jobs:
                        jobs.start_soon(self._rows_job, rows_job)
                self._finish()

    def kill(self) -> None:
        """The process is gone."""
        if self.finished:
            return
        self.alive = False
        self._finish()
        self.world.network.gone(self.peer, vanished=False)
        self.scope.cancel()

    def _finish(self) -> None:
        self.finished = True
        self._moved()

    def _moved(self) -> None:
        self.moved.set()
        self.moved = trio.Event()

    def chains(self) -> list[list[PeerId]]:
        """The peers of each chain that is in use."""
        sessions = [each.session for each in self.conversations if each.session is not None]
        return [hops for session in (*sessions, *self.sessions) if (hops := glue.hops_of(session))]

    async def _job(self, job: Job) -> None:
        await trio.sleep(job.at)
        patience = math.inf if job.patience is None else job.patience
        if job.run is not None:
            with trio.move_on_after(patience):
                story = Story(self.plan, job.prompt, job.new_tokens, job.run)
                await self._listen(story, aclosing(self._sums(job, job.run)))
            return
        longest = max(len(job.prompt), len(job.again)) + job.new_tokens
        conversation = self.swarm.conversation(longest)
        self.conversations.append(conversation)
        try:
            with trio.move_on_after(patience):
                for prompt in filter(None, (job.prompt, job.again)):
                    story = Story(self.plan, prompt, job.new_tokens)
                    guesses = None
                    if job.wrong is not None:
                        true = [*prompt, *generated(list(prompt), job.new_tokens, self.world.blocks)]
                        guesses = glue.guesses(true, job.wrong)
                    tokens = glue.tokens_of(self.swarm, conversation, prompt, job.new_tokens, guesses)
                    await self._listen(story, aclosing(tokens))
        finally:
            conversation.close()

    async def _rows_job(self, job: RowsJob) -> None:
        await trio.sleep(job.at)
        story = RowsStory(self.plan, job)
        self.rows_stories.append(story)
        with self._call(story.calls) as opening:
            longest = sum(step.tokens for step in job.steps)
            deadline = trio.current_time() + self.plan.give_up_seconds
            session = await self.swarm.open_chain(max_length=longest, batch=job.batch, deadline=deadline)
        if opening.error is not None:
            return
        self.sessions.append(session)
        try:
            for number, step in enumerate(job.steps):
                position = max(0, session.length - step.back)
                for begin in range(0, step.tokens, session.max_step_tokens):
                    part = replace(step, tokens=min(session.max_step_tokens, step.tokens - begin))
                    if begin:
                        part = replace(part, rows=None, patience=None)
                    if not await self._rows_step(story, session, part, position + begin, number):
                        return
            story.done = True
        finally:
            self.sessions.remove(session)
            session.close()

    async def _rows_step(
        self, story: RowsStory, session: Session, step: RowsStep, position: int, seed: int
    ) -> bool:
        """Do a step, once more where the client left it or it failed; whether it was done in the end."""
        hidden = some_hidden(step.tokens, story.job.batch, seed)
        step_once = partial(session.step, hidden, position, rows=step.rows)
        if step.patience is not None:
            with trio.move_on_after(step.patience), suppress(PeerFault, Refused, NoChain):
                story.applied.append(Applied(position, step.rows, hidden, await step_once()))
                return True
        for _ in range(3):
            with self._call(story.calls) as call:
                story.applied.append(Applied(position, step.rows, hidden, await step_once()))
                call.token = glue.sum_of(story.applied[-1].found)
            if call.error is None:
                return True
        return False

    @contextmanager
    def _call(self, calls: list[Call]) -> Iterator[Call]:
        """A wait of this client."""
        call = Call(self.plan.name, trio.current_time(), math.inf)
        calls.append(call)
        try:
            yield call
        except (PeerFault, Refused, NoChain) as error:
            call.error = error
            self.world.log(f"{self.plan.name} failed: {type(error).__name__}: {error}")
        finally:
            call.ended = trio.current_time()
        self.progress += 1
        self.world.network.note(self.plan.name, call.token)
        self._moved()

    async def _sums(self, job: Job, run: Blocks) -> AsyncGenerator[int, None]:
        """The sums of a session's outputs over a run, for the prompt and for each position after it."""
        hidden, prompt = glue.hidden_of(job.prompt, job.new_tokens), len(job.prompt)
        deadline = trio.current_time() + self.plan.give_up_seconds
        session = await self.swarm.open_chain(
            max_length=hidden.shape[1], start=run.start, stop=run.stop, deadline=deadline
        )
        self.sessions.append(session)
        try:
            left = max(0.0, deadline - trio.current_time())
            yield glue.sum_of(await session.prefill(hidden[:, :prompt], seconds=left))
            for position in range(prompt, hidden.shape[1]):
                yield glue.sum_of(await session.step(hidden[:, position : position + 1]))
        finally:
            self.sessions.remove(session)
            session.close()

    async def _listen(
        self, story: Story, tokens_of: AbstractAsyncContextManager[AsyncGenerator[int, None]]
    ) -> None:
        """Take one token after the other."""
        self.stories.append(story)
        async with tokens_of as tokens:
            while not story.done:
                call = Call(self.plan.name, trio.current_time(), math.inf)
                story.calls.append(call)
                try:
                    call.token = await anext(tokens)
                except StopAsyncIteration:
                    story.calls.pop()
                    story.done = True
                    return
                except (PeerFault, Refused, NoChain) as error:
                    call.error = error
                    story.done = True
                    self.world.log(f"{self.plan.name} failed: {type(error).__name__}: {error}")
                finally:
                    call.ended = trio.current_time()
                self.progress += 1
                self.world.network.note(self.plan.name, call.token)
                self._moved()
