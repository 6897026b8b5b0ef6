"""The tokens in a session's caches, and their replay after a failure.

A `Conversation` gives the logits after a list of tokens.  It knows the tokens in the hops' caches, sends
the others, and cuts the caches where the tokens differ.  The session (`client.session.session`) replaces
hops that fail; the caller's deadline alone comes through to here.
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
from node.model.blocks.rope import LengthRope
from node.runtime.compute_thread import Runner
from tensor_codec.errors import BadResult, SlowPeer
from tensor_codec.messages.contract import Reply
from tensor_codec.messages.session import Result

T = TypeVar("T")

LATE_SECONDS = 0.1  # after the deadline, for a call that hangs
CHUNKS_UNDER_WAY = 6  # of the 8 that a hop takes (Limits.max_steps_in_flight)
PREFILL_TOKENS = 256  # the most positions of one prefill step: several hops work on steps of one prompt
# The fixed cost of a step at a hop, in positions: on CPUs 32 in float32, 4 in int8.
STEP_COST_TOKENS = 24


class OpenChain(Protocol):
    """Opens a session along the best chain known now."""

    def __call__(self, *, max_length: int, deadline: float, trace: Trace) -> Awaitable[Session]:
        """Raises NoChain, PeerFault or Refused when the deadline (trio's clock) has passed."""


class Embedding(Protocol):
    """The part of `node.model.embed_and_head.EmbedAndHead` that makes hidden states."""

    @property
    def stateless(self) -> bool:
        """Whether several threads may use it at a time."""

    @property
    def rope(self) -> LengthRope | None:
        """The rule of angles that depend on the length; None where no angle does."""

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Token ids [1, tokens], the first at `position` -> hidden states [1, tokens, hidden]."""


@dataclass(slots=True)
class Conversation:
    """The tokens of one generation, or of one conversation.

    heads: shared by all conversations of the swarm, so that they share a batch.
    worked: called with the session after every answered step.
    max_length: the largest number of tokens.  give_up_seconds: for one call of `logits_after`, new
    chains and replays included; while a long prompt or a replay makes progress, as many more seconds
    for every LONG_PART of the tokens.
    """

    local_model: Embedding
    compute: Runner
    heads: HeadBatches
    open_chain: OpenChain
    worked: Callable[[Session], None]
    max_length: int
    give_up_seconds: float
    trace: Trace = field(default_factory=Trace)
    session: Session | None = None
    tokens: list[int] = field(default_factory=list)
    _rope_length: int = 0  # of the cached positions, see `StepRange`

    @property
    def recoveries(self) -> int:
        """The number of changes of the chain within sessions."""
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

        best_only: `pick` needs the place of the largest logit alone; others may be -inf.
        prompt: the number of tokens that were given and not generated; None: all.

        Raises ValueError for more than max_length tokens or none; and, when give_up_seconds have
        passed, the last PeerFault, Refused or NoChain.  A later call sends no token that the remaining
        hops have in their caches.
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
                # The session leaves that hop; the positions that it spoilt are not known.
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
        # One token at least is sent: the logits come out of its answer.
        kept = min(_common(self.tokens, tokens), len(tokens) - 1)
        if self.local_model.rope is not None:
            length = self.local_model.rope.length_of(prompt, len(tokens))
            if not self.local_model.rope.same(length, self._rope_length):
                kept = 0  # the keys in the caches have other rotary angles than these tokens have
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

        A long prompt goes in chunks, several under way at a time: several hops work at once.
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
        """The deadline of a prompt that makes progress."""
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
    """Positions of each step of a prompt with the least time on a chain of `hops`.

    The last hop computes all steps after every other hop has computed the first.  Few long steps make
    hops wait for each other, many short ones cost more (STEP_COST_TOKENS).  Ties go to the longer steps.
    """

    def cost(steps: int) -> float:
        return (tokens / steps + STEP_COST_TOKENS) * (steps + hops - 1)

    min_steps, max_steps = math.ceil(tokens / PREFILL_TOKENS), math.ceil(tokens / STEP_COST_TOKENS)
    return math.ceil(tokens / min(range(min_steps, max_steps + 1), key=cost))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    if other[: len(one)] == one:  # the usual case: a token more
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
