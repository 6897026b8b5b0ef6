"""The tokens in a session's caches, and their replay after a failure.

A `Conversation` gives the logits after a list of tokens.  It knows the tokens in the hops' caches, sends
the others, and cuts the caches where the tokens differ.  The session (`client.session.session`) replaces
hops that fail; the caller's deadline alone comes through to here.

A step may end with guessed tokens (`client.speculation`).  Its answer has a hidden state for each position.
As long as the caller's tokens are the guessed ones, their logits come out of that answer, without a step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray
from torch import Tensor

from client.generation.head_batches import HeadBatches
from client.session.core import FEW_TOKENS
from client.session.inputs import Feed
from client.session.session import Session, deadlines, decoded_rows, encoded_row, encoded_rows
from client.session.steps import Pending
from client.session.trace import Trace
from node.model.blocks.rope import LengthRope
from node.runtime.compute_thread import Runner
from tensor_codec.codecs import PackedBody
from tensor_codec.errors import BadResult, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import Reply
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


class Drafting(Protocol):
    """The part of `client.speculation.speculation.Speculation` that guesses tokens."""

    async def drafts(self, most: int) -> Sequence[int]:
        """Up to `most` guesses of the tokens after those that are known: their step is about to be sent."""

    def stepped(self, drafts: int, seconds: float) -> None:
        """A step with so many guesses was answered after so long."""

    def hindered(self, why: str) -> None:
        """No guesses can be sent."""


@dataclass(slots=True)
class GuessedRows:
    """The hidden states float32 [1, n, hidden] of a step with guesses.

    first: row i is the state after so many tokens and i.
    bests: the likeliest tokens after the rows but the first one, once one of them was asked for.
    """

    first: int
    hidden: Tensor
    bests: list[int] | None = None

    def __contains__(self, length: int) -> bool:
        """Whether it has the state after so many tokens."""
        return self.first <= length < self.first + self.hidden.shape[1]

    def at(self, length: int) -> Tensor:
        """The state [1, 1, hidden] after so many tokens."""
        return self.hidden[:, length - self.first : length - self.first + 1]

    async def best_at(self, length: int, heads: HeadBatches) -> int | None:
        """The likeliest token after so many tokens, where it is known or quicker for all rows together.

        The first guess was right, so others may be: one pass through the head serves all of them.
        """
        if length == self.first:
            return None
        if self.bests is None:
            self.bests = await heads.bests(self.hidden[:, 1:])
        return None if self.bests is None else self.bests[length - self.first - 1]


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
    _ahead: list[int] = field(default_factory=list)  # the tokens after `tokens` whose step was sent ahead
    _rows: GuessedRows | None = None  # of the last answer

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
        drafting: Drafting | None = None,
    ) -> T:
        """pick(logits float32 [vocabulary]) after `tokens`; `pick` runs in the torch thread.

        best: where the place of the largest logit is all that is needed: called with it in place of `pick`.
        prompt: the number of tokens that were given and not generated; None: all.
        follow: called with the answer; the token that the next call will have after these, or None.  Its step
        is sent before this call returns, where it can be sent at once.
        drafting: guesses the tokens after these, which the same step computes.

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
                    session, read, step = await self._answer(tokens, prompt, deadline, until, drafting)
                    try:
                        place = None
                        if best is not None and self._rows is not None:
                            place = await self._rows.best_at(len(tokens), self.heads)
                        if best is not None and place is not None:
                            picked = best(place)
                        else:
                            picked = await self.heads.pick(read, pick, best)
                        if follow is not None and (token := follow(picked)) is not None:
                            await self._send_ahead(session, len(tokens), token, drafting)
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
                self.tokens, self._rows = [], None
            except trio.TooSlowError:
                raise SlowPeer(f"no answer within {self.give_up_seconds} s") from None

    def adopt(self, session: Session, tokens: list[int]) -> None:
        """Go on with a session whose caches hold these tokens."""
        self.session, self.tokens, self._ahead, self._rows = session, list(tokens), [], None

    def keep(self, tokens: list[int]) -> None:
        """Of the positions in the caches keep those of `tokens`: the others were guessed in vain."""
        del self.tokens[_common(self.tokens, tokens) :]
        self._rows = None

    def close(self) -> None:
        """End the session; the conversation may be used again, and then opens another."""
        if self.session is not None:
            self.session.close()
        self.session, self.tokens, self._ahead, self._rows = None, [], [], None

    async def _answer(
        self, tokens: list[int], prompt: int, deadline: float, until: float, drafting: Drafting | None
    ) -> tuple[Session, Callable[[], Tensor], Pending | None]:
        """A function that gives the hidden state after the last token; its step, where not measured yet."""
        if self.session is None:
            self.session = await self.open_chain(
                max_length=self.max_length, deadline=deadline, trace=self.trace
            )
            self.tokens, self._ahead, self._rows = [], [], None
        session = self.session
        if self._rows is not None and self._is_known(tokens):
            return session, partial(self._rows.at, len(tokens)), None
        self._rows = None
        step = await self._answer_ahead(session, tokens, deadline, until)
        if step is not None and step.result is not None:
            if drafting is not None:
                drafting.stepped(step.what.tokens - 1, step.seconds)
            if step.what.tokens == 1:
                return session, partial(decoded_rows, session, step.result), step
            return session, self._reader(session, step.result, len(tokens)), step
        # One token at least is sent: the logits come out of its answer.
        kept = min(_common(self.tokens, tokens), len(tokens) - 1)
        if self.local_model.rope is not None:
            length = self.local_model.rope.length_of(prompt, len(tokens))
            if not self.local_model.rope.same(length, self._rope_length):
                kept = 0  # the keys in the caches have other rotary angles than these tokens have
            self._rope_length = length
        del self.tokens[kept:]
        drafts: Sequence[int] = ()
        if drafting is not None and kept and kept == len(tokens) - 1:
            drafts = await self._drafts(session, drafting, len(tokens))
        whole = [*tokens, *drafts] if drafts else tokens

        def answered(stop: int, _: Result) -> None:
            self.tokens = whole[:stop]

        reply: Reply = "all" if drafts else "last"
        feed = Feed(session, reply, deadline, until, self.give_up_seconds, self._rope_length)

        async def body_of(first: int, last: int) -> Buffer | PackedBody:
            return await self._embed(session, whole[first:last], first)

        result = await feed.run(kept, len(whole), body_of, answered)
        if drafting is not None and session.times is not None and len(whole) - kept <= FEW_TOKENS:
            drafting.stepped(len(whole) - kept - 1, session.times.total)
        if drafts:
            return session, self._reader(session, result, len(tokens)), None
        return session, partial(decoded_rows, session, result), None

    def _reader(self, session: Session, result: Result, first: int) -> Callable[[], Tensor]:
        """A function that gives the first hidden state of an answer, and keeps all of them.

        first: tokens up to its position.
        """

        def read() -> Tensor:
            hidden = decoded_rows(session, result)
            self._rows = GuessedRows(first, hidden)
            return hidden[:, :1]

        return read

    def _is_known(self, tokens: list[int]) -> bool:
        """Whether the last answer has the hidden state after these tokens."""
        assert self._rows is not None
        return len(tokens) in self._rows and self.tokens[: len(tokens)] == tokens

    async def _drafts(self, session: Session, drafting: Drafting, length: int) -> Sequence[int]:
        """Guesses of the tokens after so many, as far as a step and the caches can have them."""
        if self.local_model.rope is not None:
            drafting.hindered("the model's rotary angles depend on the length of the text")
            return ()
        if session.core.route.cannot_cut:
            drafting.hindered("a server keeps states of convolutions, which cannot go back")
            return ()
        most = min(self.max_length - length, session.max_step_tokens - 1, FEW_TOKENS - 1)
        return await drafting.drafts(most)

    async def _answer_ahead(
        self, session: Session, tokens: list[int], deadline: float, until: float
    ) -> Pending | None:
        """The step that was sent ahead, with its answer, where its first token is the last of these."""
        ahead, self._ahead = self._ahead, []
        if not ahead:
            return None
        cached = [*self.tokens, *ahead]
        is_wanted = len(self.tokens) + 1 == len(tokens) and cached[: len(tokens)] == tokens
        if (step := session.ahead) is None:  # it was given up
            return None
        await session.take(step, deadline=deadline, until=until)
        self.tokens = cached
        if not is_wanted:
            session.measure(step)
        return step if is_wanted else None

    async def _send_ahead(
        self, session: Session, position: int, token: int, drafting: Drafting | None
    ) -> None:
        """Send the step of the token at `position`, unless something has to be done before."""
        is_guessed = self.tokens[position : position + 1] == [token]
        if is_guessed and self._rows is not None and position + 1 in self._rows:
            return  # its answer is here
        # Where angles depend on the length the next token may have all positions computed anew.
        is_next = position <= len(self.tokens) and position < self.max_length
        if is_next and self.local_model.rope is None and self.local_model.stateless:
            drafts = () if drafting is None else await self._drafts(session, drafting, position + 1)
            ahead = [token, *drafts]
            body = await self._embed(session, ahead, position)
            del self.tokens[position:]
            self._rows = None
            if await session.send_ahead(body, position, len(ahead)):
                self._ahead = ahead

    async def _embed(self, session: Session, tokens: list[int], position: int) -> Buffer | PackedBody:
        """Tokens, the first at `position`, to the encoded hidden states [1, tokens, hidden] of a step."""
        is_one = len(tokens) == 1
        if is_one and (row := self.local_model.row_of(tokens[0])) is not None:
            return encoded_row(session, row)
        is_short = is_one or (position > 0 and len(tokens) <= FEW_TOKENS)
        if is_short and not is_one and (rows := _rows_of(self.local_model, tokens)) is not None:
            return encoded_rows(session, rows)

        def embed() -> Buffer | PackedBody:
            import torch

            ids = torch.tensor([tokens])
            return session.encode(self.local_model.embed(ids, self.first_position + position))

        # A few tokens take less time here than their way into the torch thread and back.  A model that keeps
        # state belongs to that thread, where another generation may be using it.
        here = is_short and self.local_model.stateless
        return embed() if here else await self.compute.run(embed)


def _rows_of(local_model: Embedding, tokens: Sequence[int]) -> list[NDArray[np.float32]] | None:
    """The hidden states [hidden] of tokens, where all are rows in memory; else None."""
    rows = [row for token in tokens if (row := local_model.row_of(token)) is not None]
    return rows if len(rows) == len(tokens) else None


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    if other[: len(one)] == one:  # the usual case: a token more
        return len(one)
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
