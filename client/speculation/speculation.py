"""The guesses of one generation: their source, their number, and the judgement of each.

A guess changes no token.  The sampler draws every token from the logits after the true tokens before it, and
the next position of a step is read only while the guesses before it were the tokens that were drawn
(speculative decoding, arXiv:2211.17192, with one draw for each token in place of its test).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

import trio

from client.speculation.lookup import NgramIndex, Proposal
from client.speculation.width import WidthPolicy

log = logging.getLogger("raceme")

AT_ONCE = 2048  # tokens that are indexed in one turn of the event loop: 5 ms


class Drafter(Protocol):
    """Another model that guesses tokens, see `client.speculation.draft_model.DraftModel`."""

    @property
    def seconds(self) -> float:
        """Of one guess, as measured; 0 before the first one."""

    async def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` tokens after these."""


@dataclass(slots=True)
class Crowd:
    """The generations of one client that are under way: they wait for each other's steps."""

    count: int = 0

    def enter(self) -> None:
        """One more."""
        self.count += 1

    def leave(self) -> None:
        """One less."""
        self.count -= 1


@dataclass(slots=True)
class Speculation:
    """Guesses tokens for one generation.

    policy: says how many.  drafter: guesses them; None: they are looked up in the text.
    load: makes the drafter at the beginning, where that takes time.
    is_asked: somebody asked for it by name: a reason against it goes into the log.
    """

    policy: WidthPolicy
    crowd: Crowd
    drafter: Drafter | None = None
    load: Callable[[], Awaitable[Drafter]] | None = None
    is_asked: bool = False
    _index: NgramIndex = field(default_factory=NgramIndex)
    _ends: Set[int] = frozenset()
    _room: int = 0  # tokens that may come after those that are known
    _drafts: tuple[int, ...] = ()  # of the last step
    _matched: int = 0
    _accepted: int = 0
    _seen: int = 0  # tokens since that step was made
    _is_hindered: bool = False
    _is_under_way: bool = False

    async def begin(self, prompt: Sequence[int], ends: Set[int]) -> None:
        """Before the first token.  ends: tokens after which nothing comes: no guess goes beyond them.

        Raises the errors of `load`.
        """
        self.crowd.enter()
        self._is_under_way = True
        self._ends = ends
        if self.load is not None:
            self.drafter, self.load = await self.load(), None
        for first in range(0, len(prompt), AT_ONCE):
            if self.drafter is None:
                self._index.extend(prompt[first : first + AT_ONCE])
            else:
                self._index.tokens.extend(prompt[first : first + AT_ONCE])
            if first:
                await trio.lowlevel.checkpoint()

    def end(self) -> None:
        """After the last token."""
        if self._is_under_way:
            self._is_under_way = False
            self.crowd.leave()

    def see(self, token: int, *, room: int) -> None:
        """The next token of the text is known.  room: tokens that may come after it."""
        if self._accepted == self._seen < len(self._drafts) and token == self._drafts[self._seen]:
            self._accepted += 1
        self._seen += 1
        self._room = room
        if self.drafter is None:
            self._index.extend((token,))
        else:
            self._index.tokens.append(token)

    async def drafts(self, most: int) -> Sequence[int]:
        """Up to `most` guesses of the tokens after those that are known: see `Drafting`."""
        sharing = max(1, self.crowd.count)
        drafting = 0.0 if self.drafter is None else self.drafter.seconds
        if self._seen:
            self.policy.judged(self._matched, len(self._drafts), self._accepted, drafting=drafting)
            self._seen = self._accepted = 0
        most = min(most, self._room - 1)  # the step gives one token more
        proposal = Proposal()
        if self.drafter is None:
            proposal = self._index.propose(min(most, self.policy.most))
            most = len(proposal.tokens)
        width = self.policy.width(proposal.matched, most, sharing=sharing, drafting=drafting)
        found: Sequence[int] = proposal.tokens[:width]
        if self.drafter is not None and width:
            found = await self.drafter.propose(self._index.tokens, width)
        # After an end no token is wanted, and the end itself comes out of the position before it.
        stop = next((at for at, token in enumerate(found) if token in self._ends), len(found))
        self._drafts, self._matched = tuple(found[:stop]), proposal.matched
        return self._drafts

    def stepped(self, drafts: int, seconds: float) -> None:
        """A step with so many guesses was answered after so long."""
        self.policy.stepped(drafts, seconds, sharing=max(1, self.crowd.count))

    def hindered(self, why: str) -> None:
        """No guesses can be sent: the generation goes on without."""
        if not self._is_hindered and self.is_asked:
            log.warning("speculation is off: %s", why)
        self._is_hindered = True
