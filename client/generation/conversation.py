"""The tokens in a session's caches, and their replay after a failure.

A `Conversation` gives the logits after a list of tokens.  It knows the tokens in the hops' caches, sends
the others, and cuts the caches where the tokens differ.  The session (`client.session.session`) replaces
hops that fail; the caller's deadline alone comes through to here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray
from torch import Tensor

from client.generation.head_batches import HeadBatches
from client.session.inputs import Feed
from client.session.session import Session, deadlines, decoded_row, encoded_row
from client.session.steps import Pending
from client.session.trace import Trace
from node.model.blocks.rope import LengthRope
from node.runtime.compute_thread import Runner
from tensor_codec.codecs import PackedBody
from tensor_codec.errors import BadResult, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.messages.session import Result

T = TypeVar("T")

LATE_SECONDS = 0.1  # after the deadline, for a call that hangs


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

    def row_of(self, token: int) -> NDArray[np.float32] | None:
        """The hidden state float32 [hidden] of a token, where it is a row in memory; else None."""

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """Token ids [1, tokens], the first at `position` -> hidden states [1, tokens, hidden]."""


@dataclass(slots=True)
class Conversation:
    """The tokens of one generation, or of one conversation.

    heads: shared by all conversations of the swarm, so that they share a batch.
    worked: called with the session after every answered step.  first_position: of the first token, which an
    adapter's virtual tokens may lie before.
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
    first_position: int = 0
    trace: Trace = field(default_factory=Trace)
    session: Session | None = None
    tokens: list[int] = field(default_factory=list)
    _rope_length: int = 0  # of the cached positions, see `StepRange`
    _ahead: int | None = None  # the token after `tokens` whose step was sent ahead

    @property
    def recoveries(self) -> int:
        """The number of changes of the chain within sessions."""
        return self.trace.counts["rerouted"]

    async def logits_after(
        self,
        tokens: list[int],
        pick: Callable[[Tensor], T],
        *,
        best: Callable[[int], T] | None = None,
        prompt: int | None = None,
        follow: Callable[[T], int | None] | None = None,
    ) -> T:
        """pick(logits float32 [vocabulary]) after `tokens`; `pick` runs in the torch thread.

        best: where the place of the largest logit is all that is needed: called with it in place of `pick`.
        prompt: the number of tokens that were given and not generated; None: all.
        follow: called with the answer; the token that the next call will have after these, or None.  Its step
        is sent before this call returns, where it can be sent at once.

        Raises ValueError for more than max_length tokens or none; and, when give_up_seconds have
        passed, the last PeerFault, Refused or NoChain.  A later call sends no token that the remaining
        hops have in their caches.
        """
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(f"{len(tokens)} tokens, 1 to {self.max_length} are allowed here")
        deadline, until = deadlines(self.give_up_seconds, len(tokens), None)
        prompt = prompt or len(tokens)
        while True:
            try:
                with trio.fail_at(until + LATE_SECONDS), self.heads.generation():
                    session, result, step = await self._answer(tokens, prompt, deadline, until)
                    try:
                        read = partial(decoded_row, session, result)
                        picked = await self.heads.pick(read, pick, best)
                        if follow is not None and (token := follow(picked)) is not None:
                            await self._send_ahead(session, len(tokens), token)
                    finally:
                        if step is not None:
                            session.measure(step)
                    self.worked(session)
                    return picked
            except BadResult as bad:
                if bad.peer is None or self.session is None or trio.current_time() >= deadline:
                    raise
                # The session leaves that hop; the positions that it spoilt are not known.
                self.session.distrust(bad)
                self.tokens = []
            except trio.TooSlowError:
                raise SlowPeer(f"no answer within {self.give_up_seconds} s") from None

    def adopt(self, session: Session, tokens: list[int]) -> None:
        """Go on with a session whose caches hold these tokens."""
        self.session, self.tokens, self._ahead = session, list(tokens), None

    def close(self) -> None:
        """End the session; the conversation may be used again, and then opens another."""
        if self.session is not None:
            self.session.close()
        self.session, self.tokens, self._ahead = None, [], None

    async def _answer(
        self, tokens: list[int], prompt: int, deadline: float, until: float
    ) -> tuple[Session, Result, Pending | None]:
        """The answer to the step of the last token, and that step where it is not measured yet."""
        if self.session is None:
            self.session = await self.open_chain(
                max_length=self.max_length, deadline=deadline, trace=self.trace
            )
            self.tokens, self._ahead = [], None
        session = self.session
        step = await self._answer_ahead(session, tokens, deadline, until)
        if step is not None and step.result is not None:
            return session, step.result, step
        # One token at least is sent: the logits come out of its answer.
        kept = min(_common(self.tokens, tokens), len(tokens) - 1)
        if self.local_model.rope is not None:
            length = self.local_model.rope.length_of(prompt, len(tokens))
            if not self.local_model.rope.same(length, self._rope_length):
                kept = 0  # the keys in the caches have other rotary angles than these tokens have
            self._rope_length = length
        del self.tokens[kept:]

        def answered(stop: int, _: Result) -> None:
            self.tokens = tokens[:stop]

        feed = Feed(session, "last", deadline, until, self.give_up_seconds, self._rope_length)

        async def body_of(first: int, last: int) -> Buffer | PackedBody:
            return await self._embed(session, tokens[first:last], first)

        result = await feed.run(kept, len(tokens), body_of, answered)
        return session, result, None

    async def _answer_ahead(
        self, session: Session, tokens: list[int], deadline: float, until: float
    ) -> Pending | None:
        """The step that was sent ahead, with its answer, where it is the last one of these tokens."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        cached = [*self.tokens, ahead]
        is_wanted = cached == tokens
        if (step := session.ahead) is None:  # it was given up
            return None
        await session.take(step, deadline=deadline, until=until)
        self.tokens = cached
        if not is_wanted:
            session.measure(step)
        return step if is_wanted else None

    async def _send_ahead(self, session: Session, position: int, token: int) -> None:
        """Send the step of the token at `position`, unless something has to be done before."""
        # Where angles depend on the length the next token may have all positions computed anew.
        is_next = position == len(self.tokens) < self.max_length and self.local_model.rope is None
        if is_next and self.local_model.stateless:
            body = await self._embed(session, [token], position)
            if await session.send_ahead(body, position):
                self._ahead = token

    async def _embed(self, session: Session, tokens: list[int], position: int) -> Buffer | PackedBody:
        """Tokens, the first at `position`, to the encoded hidden states [1, tokens, hidden] of a step."""

        is_one = len(tokens) == 1
        if is_one and (row := self.local_model.row_of(tokens[0])) is not None:
            return encoded_row(session, row)

        def embed() -> Buffer | PackedBody:
            import torch

            ids = torch.tensor([tokens])
            return session.encode(self.local_model.embed(ids, self.first_position + position))

        # One token takes less time here than its way into the torch thread and back.  A model that keeps
        # state belongs to that thread, where another generation may be using it.
        here = is_one and self.local_model.stateless
        return embed() if here else await self.compute.run(embed)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    if other[: len(one)] == one:  # the usual case: a token more
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
