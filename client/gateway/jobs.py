"""One request's answers, computed: a task for each, whose tokens come in one queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from client.api import SwarmLike
from client.gateway.door.keys import Caller
from client.gateway.listeners import RequestMetrics, RequestWatch
from client.gateway.openai.errors import RequestError, invalid, status_of
from client.gateway.prefixes import Kept, PrefixPool, common_length
from client.gateway.requests import ActiveRequest, RequestKind, Usage
from client.gateway.served import ServedModel
from client.gateway.telemetry.spans import RequestSpan
from client.generation.options import GenerateArguments
from routing.chains.alternatives import Constraints
from routing.names import PeerId
from tensor_codec.errors import Refused

if TYPE_CHECKING:
    from client.generation.generate import Token
    from client.session.trace import Event

PIECES_AHEAD = 8  # tokens of a request that wait for its reader, besides TOKENS_AHEAD of each answer
NO_FACTS: Mapping[str, Any] = MappingProxyType({})  # Any: JSON
SPARE_TOKENS = 2048  # that a conversation is opened for beyond its first answer, for the next turns


@dataclass(frozen=True, slots=True)
class Prompt:
    """One answer to compute.  arguments: of `generate`, besides max_new_tokens."""

    ids: list[int]
    arguments: GenerateArguments
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers that one request may use, in addition to the gateway's own constraints."""

    blocked: frozenset[PeerId] = frozenset()
    most_hops: int | None = None

    def within(self, own: Constraints) -> Constraints:
        """These and the gateway's own."""
        hops = [each for each in (own.most_hops, self.most_hops) if each is not None]
        return Constraints(
            allowed=own.allowed,
            blocked=frozenset(own.blocked).union(self.blocked),
            dtypes=own.dtypes,
            quantize=own.quantize,
            adapter=own.adapter,
            cache_tokens=own.cache_tokens,
            step_tokens=own.step_tokens,
            most_hops=min(hops, default=None),
            prompts=own.prompts,
            lora=own.lora,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it is to be computed.

    prompts: of its answers.  prompt_tokens: of all different prompts together, for the usage.
    traced: the caller wants to know the steps (`raceme.trace`): its pieces and its span have them.
    """

    kind: RequestKind
    route: str
    caller: Caller
    request_id: str
    model: ServedModel
    prompts: Sequence[Prompt]
    prompt_tokens: int
    servers: Servers | None = None
    traced: bool = False

    @property
    def max_new_tokens(self) -> int:
        """Of all answers together."""
        return sum(prompt.max_new_tokens for prompt in self.prompts)


class Piece(NamedTuple):
    """A token of one answer.  facts: its hops and events, where they are wanted.  Any: JSON."""

    choice: int
    token: Token
    facts: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Reuse:
    """Positions of a prompt that no server computes for a request: `take` hears its session's events.

    A session that has to be opened computes all of them; a server that takes another one's place computes
    those that are replayed to it; and a step computes from its position on.
    """

    tokens: int

    def take(self, event: Event) -> None:
        """One event of the session's trace, before the first token.  For trio's thread."""
        match event.kind:
            case "opened":
                self.tokens = 0
            case "replayed":
                self.tokens = min(self.tokens, event.data["start"])
            case "step":
                self.tokens = min(self.tokens, event.data["position"])


class _Silence:
    """Stands for a time without a token."""


_SILENCE = _Silence()


@dataclass(eq=False, slots=True)
class Running:
    """The answers of a job, under way.  Made by `Gateway.running`."""

    swarm: SwarmLike
    job: Job
    request: ActiveRequest
    watch: RequestWatch
    metrics: RequestMetrics
    prefixes: PrefixPool
    headers: Mapping[str, str]
    max_kept_tokens: int
    span: RequestSpan
    status: int = 200  # of the answer, as far as it is known
    _items: asyncio.Queue[Piece | _Silence | BaseException | None] = field(
        default_factory=lambda: asyncio.Queue(PIECES_AHEAD)
    )
    _failure: BaseException | None = None  # came after the last pieces that were taken
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _open: int = 0  # answers that are not over
    _stopped: RequestError | None = None

    @property
    def usage(self) -> Usage:
        """The tokens until now."""
        request = self.request
        return Usage(request.prompt_tokens, request.completion_tokens, request.cached_tokens)

    @asynccontextmanager
    async def started(self, at_once: int) -> AsyncIterator[None]:
        """The answers are computed within this block, `at_once` of them at a time."""
        places = asyncio.Semaphore(at_once)
        self._open = len(self.job.prompts)
        try:
            self._tasks = [
                asyncio.create_task(self._compute(choice, places)) for choice in range(len(self.job.prompts))
            ]
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            # Each waits until its session has been given up: at once, or within the bridge's own time.
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self) -> Piece | None:
        """The next token of any answer; None after the last one.

        Raises RequestError, NoChain, PeerFault, Refused.  May be cancelled and called again.
        """
        while self._open:
            if (piece := self._accepted(await self._item())) is not None:
                return piece
        return None

    async def batch(self) -> list[Piece] | None:
        """The next token, and all others that are there already; none after `end_silence`.

        None after the last one.  Raises as `next`.
        """
        found: list[Piece] = []
        while self._open and not (found and self._items.empty()):
            item = await self._item()
            if item is _SILENCE:
                return found
            if isinstance(item, BaseException) and found:
                self._failure = item  # after these
                return found
            if (piece := self._accepted(item)) is not None:
                found.append(piece)
        return found or None

    def end_silence(self) -> None:
        """Have a `batch` that waits return without a token."""
        if self._items.empty():
            self._items.put_nowait(_SILENCE)

    async def _item(self) -> Piece | _Silence | BaseException | None:
        if self._stopped is not None:
            return self._stopped
        if self._failure is not None:
            return self._failure
        return await self._items.get()

    def _accepted(self, item: Piece | _Silence | BaseException | None) -> Piece | None:
        """The token among what the answers' tasks put into the queue; counts the answers that end."""
        if isinstance(item, BaseException):
            self.status = status_of(item)
            raise item
        if item is None:
            self._open -= 1
        return item if isinstance(item, Piece) else None

    async def pieces(self) -> AsyncIterator[Piece]:
        """All tokens; raises as `next`."""
        while (piece := await self.next()) is not None:
            yield piece

    def stop(self, error: RequestError) -> None:
        """End the answers; `next` raises the error."""
        self._stopped = error
        for task in self._tasks:
            task.cancel()
        while not self._items.empty():
            self._items.get_nowait()
        self._items.put_nowait(error)

    async def _compute(self, choice: int, places: asyncio.Semaphore) -> None:
        """Compute one answer into the queue."""
        try:
            async with places:
                try:
                    await self._generate(choice)
                finally:
                    self.watch.answered(choice)
            await self._items.put(None)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  raised again by `next`, where the request is answered
            await self._items.put(error)

    async def _generate(self, choice: int) -> None:
        """Compute one answer; where the servers are full, once more without the kept conversations."""
        before = self.request.completion_tokens
        try:
            await self._attempt(choice)
        except Refused:
            kept = self.prefixes.clear()
            for each in kept:
                each.conversation.close()
            if not kept or self.request.completion_tokens > before:
                raise
            await self._attempt(choice)

    async def _attempt(self, choice: int) -> None:
        prompt = self.job.prompts[choice]
        kept = self._conversation(choice, prompt)
        tokens = list(prompt.ids)
        is_whole = False
        reuse = Reuse(min(common_length(kept.tokens, prompt.ids), len(prompt.ids) - 1))
        kept.conversation.trace.listen(reuse.take)
        try:
            # The page and the traces of requests tell a step for each token.
            arguments: GenerateArguments = {"max_new_tokens": prompt.max_new_tokens, "speculate": "off"}
            try:
                generated = self.swarm.generate(
                    prompt.ids, conversation=kept.conversation, **(prompt.arguments | arguments)
                )
            except ValueError as error:
                raise invalid(str(error)) from None
            async with aclosing(generated):
                async for token in generated:
                    if len(tokens) == len(prompt.ids):
                        kept.conversation.trace.unlisten(reuse.take)
                        if self._is_first(choice):
                            self.request.reuse(reuse.tokens)
                    tokens.append(token.id)
                    is_whole = token.finish_reason is not None
                    await self._items.put(self._piece(choice, token))
        except ValueError as error:  # the options forbid every token
            raise invalid(str(error)) from None
        finally:
            kept.conversation.trace.unlisten(reuse.take)
            self.span.leave(kept.conversation.trace)
            if is_whole and self._is_first(choice):
                cached = tokens[:-1]  # nobody has computed with the last one
                now = asyncio.get_running_loop().time()
                for gone in self.prefixes.keep(kept, cached, now, self.max_kept_tokens):
                    gone.conversation.close()
            else:
                kept.conversation.close()

    def _conversation(self, choice: int, prompt: Prompt) -> Kept:
        """A kept conversation that begins as the prompt does, or a new one."""
        job = self.job
        owner = (job.caller.name, job.model.name, job.servers)
        length = len(prompt.ids) + prompt.max_new_tokens
        found = self.prefixes.take(owner, prompt.ids, length, asyncio.get_running_loop().time())
        if found is not None:
            self.watch.follow(found.conversation.trace, choice)
            self.span.follow(found.conversation.trace)
            return found
        room = max(length, min(length + SPARE_TOKENS, 2 * length + SPARE_TOKENS // 4, self._longest()))
        constraints = None if job.servers is None else job.servers.within(self.swarm.config.constraints)
        trace = self.watch.trace(choice)
        self.span.follow(trace)
        try:
            conversation = self.swarm.conversation(
                room, adapter=job.model.adapter, trace=trace, constraints=constraints
            )
        except ValueError as error:
            raise invalid(str(error)) from None
        return Kept(owner, conversation, room)

    def _is_first(self, choice: int) -> bool:
        """Whether no earlier answer has the same prompt: one conversation is enough for the next turn."""
        ids = self.job.prompts[choice].ids
        return all(earlier.ids is not ids for earlier in self.job.prompts[:choice])

    def _longest(self) -> int:
        """Tokens of a session that does not wait for others."""
        return self.swarm.usual_length() - self.job.model.virtual_tokens

    def _piece(self, choice: int, token: Token) -> Piece:
        request = self.request
        if request.completion_tokens:
            self.metrics.token(request)
        else:
            self.metrics.first_token(request, time.time() - request.began)
        request.count()
        self.span.token(token.finish_reason)
        return Piece(choice, token, self.watch.token(choice) if self.job.traced else NO_FACTS)
