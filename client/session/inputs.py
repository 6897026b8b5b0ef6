"""The inputs of a session: their checks, and the chunks of a long one.

A long input goes in chunks, several under way at a time: several hops work at once.  Prompts of tokens
(`client.generation.conversation`) and hidden states (`Session.prefill`) go the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from torch import Tensor

from client.session.steps import Pending
from client.session.terms import Terms
from node.runtime import values
from routing.chains.hops import Chain
from tensor_codec.codecs import PackedBody
from tensor_codec.frame import Buffer
from tensor_codec.messages.contract import Reply
from tensor_codec.messages.session import Result

CHUNKS_UNDER_WAY = 6  # of the 8 that a hop takes (Limits.max_steps_in_flight)
PREFILL_TOKENS = 256  # the most positions, of all rows, of one chunk: several hops work on one input
# The most on a chain of one hop that computes so many within LONG_CHUNK_SECONDS: a GPU wastes a shorter
# chunk, and no other hop could work meanwhile.
LONG_PREFILL_TOKENS = 1024
LONG_CHUNK_SECONDS = 0.25
# The fixed cost of a step at a hop, in positions: on CPUs 32 in float32, 4 in int8.
STEP_COST_TOKENS = 24


class StepTaker(Protocol):
    """The part of `client.session.session.Session` that takes chunks."""

    @property
    def chain(self) -> Chain:
        """The hops that it runs along now."""

    @property
    def max_step_tokens(self) -> int:
        """Positions that one step may carry."""

    async def submit(
        self,
        body: Buffer | PackedBody,
        position: int,
        tokens: int,
        reply: Reply,
        *,
        deadline: float | None = None,
        rope_length: int = 0,
    ) -> Pending:
        """See `Session.submit`."""

    async def collect(
        self, pending: Pending, *, deadline: float | None = None, until: float | None = None
    ) -> Result:
        """See `Session.collect`."""

    def give_up_steps(self) -> None:
        """See `Session.give_up_steps`."""


@dataclass(slots=True)
class Feed:
    """The way of one input into a session.

    reply: of the input: "all" positions come back, the "last" one, or "none".
    deadline, until: on trio's clock; a chunk that is answered moves the deadline to `seconds` from then on,
    up to `until`.
    rope_length: see `StepRange`.  rows: of the session.
    """

    session: StepTaker
    reply: Reply
    deadline: float
    until: float
    seconds: float
    rope_length: int = 0
    rows: int = 1

    async def run(
        self,
        begin: int,
        stop: int,
        body_of: Callable[[int, int], Awaitable[Buffer | PackedBody]],
        answered: Callable[[int, Result], object],
    ) -> Result:
        """Send positions [begin, stop), one at least; the answer to the last chunk.

        body_of: makes the encoded hidden states of positions [first, last).
        answered: called for each chunk, in their order, with the position after it and its answer.
        Raises as `Session.step`; then the chunks on their way are given up.
        """
        under_way: deque[tuple[int, Pending]] = deque()
        try:
            chunk = 1 if stop - begin == 1 else self._chunk(stop - begin)
            # About as many positions as there are in the usual number of usual chunks.
            most = round(CHUNKS_UNDER_WAY * PREFILL_TOKENS / max(PREFILL_TOKENS, chunk * self.rows))
            most = max(2, most)
            for first in range(begin, stop, chunk):
                last = min(first + chunk, stop)
                body = await body_of(first, last)
                if len(under_way) == most:
                    await self._collect(under_way, answered)
                reply: Reply = "none" if self.reply == "last" and last < stop else self.reply
                pending = await self.session.submit(
                    body, first, last - first, reply, deadline=self.deadline, rope_length=self.rope_length
                )
                under_way.append((last, pending))
            while len(under_way) > 1:
                await self._collect(under_way, answered)
            return await self._collect(under_way, answered)
        except BaseException:
            self.session.give_up_steps()
            raise

    def _chunk(self, tokens: int) -> int:
        """Positions of each row in one chunk."""
        chain = self.session.chain
        of_all_rows = chunk_tokens(
            tokens * self.rows, len(chain.hops), chain.seconds_per_position,
            delay=chain.delay_seconds, line=chain.line_seconds / self.rows,
        )  # fmt: skip
        return min(math.ceil(of_all_rows / self.rows), self.session.max_step_tokens)

    async def _collect(
        self, under_way: deque[tuple[int, Pending]], answered: Callable[[int, Result], object]
    ) -> Result:
        stop, pending = under_way.popleft()
        result = await self.session.collect(pending, deadline=self.deadline, until=self.until)
        self.deadline = max(self.deadline, min(trio.current_time() + self.seconds, self.until))
        answered(stop, result)
        return result


def chunk_tokens(
    tokens: int,
    hops: int,
    seconds_per_position: float = math.inf,
    *,
    delay: float = 0.0,
    line: float = 0.0,
) -> int:
    """Positions of each step of an input with the least time on a chain of `hops`.

    The last hop computes all steps after every other hop has computed the first.  Few long steps make
    hops wait for each other, many short ones cost more (STEP_COST_TOKENS).  At most CHUNKS_UNDER_WAY steps
    are on their way: over long ways each further one waits for an answer first, and so goes later than it
    could.  Ties go to the longer steps.
    seconds_per_position: of an input, at all hops together.  delay: seconds along the chain and back, without
    bytes.  line: seconds of a position on the slowest link.  Without the first the other two say nothing.
    O(tokens / STEP_COST_TOKENS).
    """
    is_known = seconds_per_position < math.inf
    each = seconds_per_position / hops if is_known else 1.0
    if not is_known:
        delay = line = 0.0

    def cost(steps: int) -> float:
        computing, sending = (tokens / steps + STEP_COST_TOKENS) * each, tokens / steps * line
        slower = max(computing, sending)
        first = delay + hops * (computing + sending)
        rounds, others = divmod(steps - 1, CHUNKS_UNDER_WAY)
        return rounds * max(CHUNKS_UNDER_WAY * slower, first) + others * slower + first

    is_fast = hops == 1 and LONG_PREFILL_TOKENS * seconds_per_position <= LONG_CHUNK_SECONDS
    longest = LONG_PREFILL_TOKENS if is_fast else PREFILL_TOKENS
    min_steps, max_steps = math.ceil(tokens / longest), math.ceil(tokens / STEP_COST_TOKENS)
    return math.ceil(tokens / min(range(min_steps, max_steps + 1), key=cost))


def check_input(terms: Terms, hidden: Any, position: Any, reply: Any, seconds: Any) -> None:  # Any: checked
    """Raises ValueError for hidden states, or arguments of a step, that no server would take."""
    rows, size = terms.batch, terms.hidden
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise ValueError(f"hidden is {values.shown(hidden)}, a tensor of floats is needed")
    shape = tuple(hidden.shape)
    if len(shape) != 3 or shape[0] != rows or shape[2] != size:
        raise ValueError(f"hidden is {list(shape)}, [{rows}, tokens, {size}] is needed")
    if position is not None:
        values.whole("position", position, 0)
    if reply not in ("all", "last", "none"):
        raise ValueError(f"reply is {values.shown(reply)}, all, last or none is allowed")
    if seconds is not None:
        values.seconds("seconds", seconds)
