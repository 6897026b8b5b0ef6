"""Tokens in a session's caches, and how they get there again when something goes wrong.

A `Conversation` is asked for the logits after some tokens.  It keeps track of which of them the hops
have in their caches already, sends only the rest, and cuts where the tokens differ.  Hops that fail
are the session's affair (`client.session.session`): what comes through to here is the caller's deadline.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import trio
from torch import Tensor

from client.generation.head_batches import HeadBatches
from client.session.session import Session, long_parts
from client.session.steps import Pending
from client.session.trace import Trace
from node.model.embed_and_head import EmbedAndHead
from node.runtime.compute_thread import ComputeThread
from tensor_codec.errors import BadResult, SlowPeer
from tensor_codec.messages.contract import Reply
from tensor_codec.messages.session import Result

T = TypeVar("T")

LATE_SECONDS = 0.1  # after the deadline, whatever it is that hangs
CHUNKS_UNDER_WAY = 6  # of the 8 that a hop takes (Limits.max_steps_in_flight)
PREFILL_TOKENS = 256  # most positions of one prefill step: hops work on different ones at a time
# What a step costs a hop beside its positions, counted in these: on CPUs 32 in float32, 4 in int8.
STEP_COST_TOKENS = 24


class OpenChain(Protocol):
    """How a conversation gets a session: along the best chain known now."""

    def __call__(self, *, max_length: int, deadline: float, trace: Trace) -> Awaitable[Session]:
        """Raises NoChain, PeerFault or Refused when the deadline (trio's clock) has passed."""


@dataclass(slots=True)
class Conversation:
    """The tokens of one generation, or of one conversation.

    heads: of all conversations of the swarm, so that they share a batch.
    worked: told of every step that came back.
    max_length: tokens that it may grow to.  give_up_seconds: how long one call of `logits_after`
    may try, new chains and replays included; while a long prompt or a replay gets on, as many more for
    every LONG_PART of the tokens.
    """

    local_model: EmbedAndHead
    compute: ComputeThread
    heads: HeadBatches
    open_chain: OpenChain
    worked: Callable[[Session], None]
    max_length: int
    give_up_seconds: float
    trace: Trace = field(default_factory=Trace)
    session: Session | None = None
    tokens: list[int] = field(default_factory=list)
    _rope_length: int = 0  # of what the caches hold, see `StepRange`

    @property
    def recoveries(self) -> int:
        """How often the chain was changed in mid-session."""
        return self.trace.counts["rerouted"]

    async def logits_after(
        self,
        tokens: list[int],
        pick: Callable[[Tensor], T],
        *,
        best_only: bool = False,
        prompt: int | None = None,
    ) -> T:
        """pick(logits float32 [vocabulary]) after `tokens`; `pick` runs in the torch thread.

        best_only: it wants to know which is the largest and no more; others may be -inf.
        prompt: how many of the tokens were given and not generated; None: all.

        Raises ValueError for more than max_length tokens or none; and, when give_up_seconds have
        passed, the last PeerFault, Refused or NoChain.  It may be asked again afterwards: what the
        hops that are left have in their caches is not sent again.
        """
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(f"{len(tokens)} tokens, 1 to {self.max_length} are allowed here")
        deadline = trio.current_time() + self.give_up_seconds
        until = deadline + self.give_up_seconds * long_parts(len(tokens))
        while True:
            try:
                with trio.fail_at(until + LATE_SECONDS):
                    return await self._attempt(
                        tokens, pick, best_only, prompt or len(tokens), deadline, until
                    )
            except BadResult as bad:
                if bad.peer is None or self.session is None or trio.current_time() >= deadline:
                    raise
                # The hop that made it is left; which positions it spoilt is not known.
                self.session.distrust(bad)
                self.tokens = []
            except trio.TooSlowError:
                raise SlowPeer(f"no answer within {self.give_up_seconds} s") from None

    def close(self) -> None:
        """End the session; the conversation may be used again, and then opens another."""
        if self.session is not None:
            self.session.close()
        self.session, self.tokens = None, []

    async def _attempt(
        self,
        tokens: list[int],
        pick: Callable[[Tensor], T],
        best_only: bool,
        prompt: int,
        deadline: float,
        until: float,
    ) -> T:
        if self.session is None:
            self.session = await self.open_chain(
                max_length=self.max_length, deadline=deadline, trace=self.trace
            )
            self.tokens = []
        session = self.session
        # At least one token is sent, for there must be an answer to take the logits from.
        kept = min(_common(self.tokens, tokens), len(tokens) - 1)
        if self.local_model.rope is not None:
            length = self.local_model.rope.length_of(prompt, len(tokens))
            if not self.local_model.rope.same(length, self._rope_length):
                kept = 0  # the caches hold keys with other angles than these tokens would have by themselves
            self._rope_length = length
        del self.tokens[kept:]
        result = await self._feed(session, tokens, kept, deadline, until)
        picked = await self.heads.pick(partial(session.decode, result), pick, best_only=best_only)
        self.worked(session)
        return picked

    async def _feed(
        self, session: Session, tokens: list[int], kept: int, deadline: float, until: float
    ) -> Result:
        """Send all tokens from position `kept` on; the answer to the last one.

        A long prompt goes in chunks, several on their way at a time: hops work on different ones.
        """
        try:
            return await self._feed_chunks(session, tokens, kept, deadline, until)
        except BaseException:
            session.give_up_steps()
            raise

    async def _feed_chunks(
        self, session: Session, tokens: list[int], kept: int, deadline: float, until: float
    ) -> Result:
        chunk = min(chunk_tokens(len(tokens) - kept, len(session.chain.hops)), session.max_step_tokens)
        under_way: deque[tuple[int, Pending]] = deque()
        for begin in range(kept, len(tokens), chunk):
            stop = min(begin + chunk, len(tokens))
            body = await self._embed(session, tokens[begin:stop], begin)
            if len(under_way) == CHUNKS_UNDER_WAY:
                await self._acknowledge(session, tokens, *under_way.popleft(), deadline, until)
                deadline = self._moved(deadline, until)
            reply: Reply = "last" if stop == len(tokens) else "none"
            pending = await session.submit(
                body, begin, stop - begin, reply, deadline=deadline, rope_length=self._rope_length
            )
            under_way.append((stop, pending))
        while len(under_way) > 1:
            await self._acknowledge(session, tokens, *under_way.popleft(), deadline, until)
            deadline = self._moved(deadline, until)
        return await self._acknowledge(session, tokens, *under_way.popleft(), deadline, until)

    def _moved(self, deadline: float, until: float) -> float:
        """The deadline of a prompt that gets on."""
        return max(deadline, min(trio.current_time() + self.give_up_seconds, until))

    async def _acknowledge(
        self,
        session: Session,
        tokens: list[int],
        stop: int,
        pending: Pending,
        deadline: float,
        until: float,
    ) -> Result:
        result = await session.collect(pending, deadline=deadline, until=until)
        self.tokens = tokens[:stop]
        return result

    async def _embed(self, session: Session, tokens: list[int], position: int) -> memoryview:
        """Token ids to the encoded hidden states [1, tokens, hidden] of the first hop's input."""

        def embed() -> memoryview:
            import torch

            return memoryview(session.encode(self.local_model.embed(torch.tensor([tokens]), position)))

        # One token takes less time here than its way into the torch thread and back.  A model that keeps
        # state belongs to that thread, where another generation may be using it.
        here = len(tokens) == 1 and self.local_model.stateless
        return embed() if here else await self.compute.run(embed)


def chunk_tokens(tokens: int, hops: int) -> int:
    """Positions of each step of a prompt, so that a chain of so many hops is done with it soonest.

    The last hop is done when it has had all steps and, before the first, every other hop one.  Few long
    steps let hops wait for each other, many short ones cost more (STEP_COST_TOKENS); ties go to the longer.
    """

    def cost(steps: int) -> float:
        return (tokens / steps + STEP_COST_TOKENS) * (steps + hops - 1)

    fewest, most = math.ceil(tokens / PREFILL_TOKENS), math.ceil(tokens / STEP_COST_TOKENS)
    return math.ceil(tokens / min(range(fewest, most + 1), key=cost))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    if other[: len(one)] == one:  # the usual case: a token more
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
