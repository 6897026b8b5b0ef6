"""Tokens in a chain's caches, and how they get there again when a chain breaks.

A `Context` is asked for the logits after some tokens.  It keeps track of which of them the hops
have in their caches already, sends only the rest, cuts where the tokens differ, and opens a new
session along another chain when a hop fails: the tokens are then sent again from the first one.
Which peers have failed lately is kept for all contexts together in `Blame`.
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

from client.heads import Heads
from client.session import Pending, Session
from node.compute import ComputeThread
from node.model.ends import Ends
from routing.chain import NoChain
from routing.names import PeerId
from tensor_codec.errors import PeerFault, Refused, SlowPeer
from tensor_codec.messages import Reply, Result

T = TypeVar("T")

AVOID_SECONDS = 15.0  # after a fault; doubles with every further one
AVOID_MOST_SECONDS = 3600.0
CHUNKS_UNDER_WAY = 4  # half of what a hop takes (Limits.max_steps_in_flight)
PREFILL_TOKENS = 256  # most positions of one prefill step: hops work on different ones at a time
# What a step costs a hop beside its positions, counted in these: on CPUs 32 in float32, 4 in int8.
STEP_COST_TOKENS = 24


@dataclass(slots=True)
class Blame:
    """Peers to be avoided, and until when.  Times are the caller's clock, in seconds."""

    _until: dict[PeerId, float] = field(default_factory=dict)
    _faults: dict[PeerId, int] = field(default_factory=dict)

    def fault(self, peer: PeerId, now: float) -> None:
        """A peer was wrong, slow or gone: avoid it for 15 s, doubling up to an hour."""
        count = self._faults[peer] = self._faults.get(peer, 0) + 1
        self._until[peer] = now + min(AVOID_SECONDS * 2 ** min(count - 1, 20), AVOID_MOST_SECONDS)

    def refused(self, peer: PeerId, retry_after_seconds: float | None, now: float) -> None:
        """A peer said no: ask others for a while, without blaming it."""
        until = now + (AVOID_SECONDS if retry_after_seconds is None else retry_after_seconds)
        self._until[peer] = max(until, self._until.get(peer, until))

    def worked(self, peer: PeerId) -> None:
        """A peer answered: its earlier faults are forgotten."""
        self._faults.pop(peer, None)
        self._until.pop(peer, None)

    def avoided(self, now: float) -> frozenset[PeerId]:
        """The peers to leave out now."""
        return frozenset(peer for peer, until in self._until.items() if until > now)


class OpenChain(Protocol):
    """How a context gets a session: along the best chain known now."""

    def __call__(self, *, max_length: int) -> Awaitable[Session]:
        """Raises PeerFault or Refused with `peer`, NoChain when none came up in time."""


@dataclass(slots=True)
class Context:
    """The tokens of one generation, or of one conversation.

    heads: of all contexts of the swarm, so that they share a batch.
    worked: told of every step that came back.
    max_length: tokens that it may grow to.  give_up_seconds: how long one call of `logits_after`
    may try, new chains and replays included.
    """

    ends: Ends
    compute: ComputeThread
    heads: Heads
    open_chain: OpenChain
    blame: Blame
    worked: Callable[[Session], None]
    max_length: int
    give_up_seconds: float
    session: Session | None = None
    tokens: list[int] = field(default_factory=list)
    replays: int = 0

    async def logits_after(
        self, tokens: list[int], pick: Callable[[Tensor], T], *, best_only: bool = False
    ) -> T:
        """pick(logits float32 [vocabulary]) after `tokens`; `pick` runs in the torch thread.

        best_only: it wants to know which is the largest and no more; others may be -inf.

        Raises ValueError for more than max_length tokens or none; and, when give_up_seconds have
        passed, the last PeerFault, Refused or NoChain.
        """
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(f"{len(tokens)} tokens, 1 to {self.max_length} are allowed here")
        deadline = trio.current_time() + self.give_up_seconds
        failure: PeerFault | Refused | NoChain | None = None
        while failure is None or trio.current_time() < deadline:
            try:
                with trio.fail_at(deadline):
                    return await self._attempt(tokens, pick, best_only)
            except (PeerFault, Refused) as error:
                failure = error
                self._drop_session(error)
            except NoChain as error:
                raise (failure or error) from error
            except trio.TooSlowError:
                break
        self.close()
        raise failure or SlowPeer(f"no answer within {self.give_up_seconds} s")

    def close(self) -> None:
        """End the session; the context may be used again, and then opens another."""
        if self.session is not None:
            self.session.close()
        self.session, self.tokens = None, []

    async def _attempt(self, tokens: list[int], pick: Callable[[Tensor], T], best_only: bool) -> T:
        if self.session is None:
            self.session = await self.open_chain(max_length=self.max_length)
            self.tokens = []
        session = self.session
        # At least one token is sent, for there must be an answer to take the logits from.
        kept = min(_common(self.tokens, tokens), len(tokens) - 1)
        del self.tokens[kept:]
        result = await self._feed(session, tokens, kept)
        picked = await self.heads.pick(partial(session.decode, result), pick, best_only=best_only)
        self.worked(session)
        return picked

    async def _feed(self, session: Session, tokens: list[int], kept: int) -> Result:
        """Send all tokens from position `kept` on; the answer to the last one.

        A long prompt goes in chunks, several on their way at a time: hops work on different ones.
        """
        hops = 1 if session.relay else len(session.chain.hops)  # one step at a time in relay mode
        chunk = min(chunk_tokens(len(tokens) - kept, hops), session.max_step_tokens)
        under_way: deque[tuple[int, Pending]] = deque()
        for begin in range(kept, len(tokens), chunk):
            stop = min(begin + chunk, len(tokens))
            body = await self._embed(session, tokens[begin:stop], begin)
            if len(under_way) == CHUNKS_UNDER_WAY:
                await self._acknowledge(session, tokens, *under_way.popleft())
            reply: Reply = "last" if stop == len(tokens) else "none"
            under_way.append((stop, await session.submit(body, begin, stop - begin, reply)))
        while len(under_way) > 1:
            await self._acknowledge(session, tokens, *under_way.popleft())
        return await self._acknowledge(session, tokens, *under_way.popleft())

    async def _acknowledge(self, session: Session, tokens: list[int], stop: int, pending: Pending) -> Result:
        result = await session.collect(pending)
        self.tokens = tokens[:stop]
        return result

    async def _embed(self, session: Session, tokens: list[int], position: int) -> memoryview:
        """Token ids to the encoded hidden states [1, tokens, hidden] of the first hop's input."""

        def embed() -> memoryview:
            import torch

            return memoryview(session.encode(self.ends.embed(torch.tensor([tokens]), position)))

        # One token takes less time here than its way into the torch thread and back; ends that are
        # not stateless belong to that thread, where another generation may be using them.
        here = len(tokens) == 1 and self.ends.stateless
        return embed() if here else await self.compute.run(embed)

    def _drop_session(self, error: PeerFault | Refused) -> None:
        now = trio.current_time()
        if error.peer is not None and isinstance(error, Refused):
            self.blame.refused(PeerId(error.peer), error.retry_after_seconds, now)
        elif error.peer is not None:
            self.blame.fault(PeerId(error.peer), now)
        if self.tokens:
            self.replays += 1
        self.close()


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
