"""Chains, and the error where none exists.  Apart from the search, so that their users load no numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from routing.blocks import Blocks
from routing.names import PeerId


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks [start, stop) that a chain uses of one peer's span."""

    peer: PeerId
    start: int
    stop: int

    @property
    def blocks(self) -> Blocks:
        """The blocks that the chain uses."""
        return Blocks(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops that cover a run of blocks, in order, each peer at most once.

    expected_seconds: of one decode step, from the client and back to it.
    seconds_per_position: of a prompt, at all hops together, as they announce it; infinite where that is not
    known.
    delay_seconds: of the way along the hops and back to the client, without computing and without bytes.
    line_seconds: of one position of a prompt on the slowest link, as far as links were timed.
    """

    hops: tuple[Hop, ...]
    expected_seconds: float
    seconds_per_position: float = math.inf
    delay_seconds: float = 0.0
    line_seconds: float = 0.0


class NoChain(Exception):
    """The swarm, as it is known now, cannot compute these blocks.

    missing: the runs of blocks without a server.
    alone: no block of this model has a server.
    instead: the models that the swarm serves, where it serves others; for people.
    most_hops: every block is served, but a chain needs more hops than this.
    constrained: number of peers that serve missing blocks and that the client's constraints leave out.
    asked_tokens, session_tokens: the length of the session, in tokens, and the longest that servers of the
        missing blocks take; 0 where length is not the reason.
    silent: number of peers that serve missing blocks by their records, and do not answer.
    adapter: the name of an adapter that no peer of the missing blocks keeps; "" where that is not the reason.
    after: the last error while a chain was looked for, or None; for people.
    """

    constrained: int = 0
    asked_tokens: int = 0
    session_tokens: int = 0
    silent: int = 0
    adapter: str = ""
    after: Exception | None = None

    def __init__(
        self,
        missing: Sequence[Blocks],
        blocks: int,
        *,
        alone: bool,
        excluded: int = 0,
        instead: Sequence[str] = (),
        most_hops: int | None = None,
    ) -> None:
        runs = ", ".join(map(str, missing))
        found = f"no peer serves any of blocks {runs} of {blocks}"
        if not alone:
            found = f"blocks {runs} of {blocks} are served by nobody"
        if most_hops is not None:
            found = f"blocks {runs} of {blocks} take more than {most_hops} hop{'s' * (most_hops != 1)}"
        aside = f" ({excluded} left out after a failure)" if excluded else ""
        other = f"; the swarm serves {', '.join(instead)}" if instead else ""
        super().__init__(found + aside + other)
        self.missing = tuple(missing)
        self.blocks = blocks
        self.alone = alone

    def explain(
        self,
        *,
        silent: int = 0,
        constrained: int = 0,
        asked_tokens: int = 0,
        session_tokens: int = 0,
        adapter: str = "",
        after: Exception | None = None,
    ) -> None:
        """Add details, by the fields of the class; a detail that is not given stays."""
        self.silent, self.constrained = silent or self.silent, constrained or self.constrained
        self.asked_tokens = asked_tokens or self.asked_tokens
        self.session_tokens = session_tokens or self.session_tokens
        self.adapter = adapter or self.adapter
        self.after = after or self.after

    def __str__(self) -> str:
        kept_out = ""
        if self.silent:
            peers = "1 peer that serves" if self.silent == 1 else f"{self.silent} peers that serve"
            kept_out = f"; no answer from {peers} some of them"
        if self.constrained:
            peers = "1 peer that serves" if self.constrained == 1 else f"{self.constrained} peers that serve"
            kept_out += f"; constraints leave out {peers} some of them"
        if self.adapter:
            kept_out += f"; none of these keeps an adapter {self.adapter!r}"
        if self.session_tokens:
            kept_out += (
                f"; a session of {self.asked_tokens} tokens was asked for, servers of these blocks take"
                f" {self.session_tokens} at most"
            )
        last = f"; the last that went wrong: {self.after}" if self.after is not None else ""
        return super().__str__() + kept_out + last
