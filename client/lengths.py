"""The length of sessions: the smallest of the bounds of the model, the servers and this client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routing.blocks import Blocks
from routing.chains.alternatives import Constraints, longest_session, suitable
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.model.checkpoint.info import ModelInfo
    from routing.view.view import SwarmView

USUAL_LENGTH = 2048  # positions of a session without a length, where no server has announced one


@dataclass(frozen=True, slots=True)
class SessionLengths:
    """Lengths of sessions, in positions of each row.

    last_view: the swarm as known at the last look; constraints: the servers of it that may be used.
    For any thread.
    """

    info: ModelInfo
    limits: Limits
    constraints: Constraints
    last_view: Callable[[], SwarmView]

    def usual(self, batch: int, run: Blocks | None = None) -> int:
        """Of a session of `batch` rows without a length of its own.  See `Swarm.usual_length`.

        run, here and below: the blocks that the session goes through; None: all.
        """
        longest = self._of_servers(run)
        usual = USUAL_LENGTH
        if longest is not None:
            share = int(longest * self.limits.cache_share_per_peer)
            usual = max(share, min(longest, USUAL_LENGTH)) // batch
        return max(1, min(usual, self.longest(batch, run)))

    def longest(self, batch: int, run: Blocks | None = None) -> int:
        """Of the longest session of `batch` rows."""
        return min(self._allowed(batch, run))[0]

    def check(
        self,
        length: int,
        what: str,
        batch: int = 1,
        run: Blocks | None = None,
        *,
        virtual_tokens: int = 0,
    ) -> None:
        """Raises ValueError where a session of `batch` rows cannot have `length`.  what: for the message.

        virtual_tokens: of a prefix, in front of the length.
        """
        longest, why = min(self._allowed(batch, run))
        if virtual_tokens:
            longest, why = longest - virtual_tokens, f"{why}, and a prefix takes {virtual_tokens}"
        if not 0 < length <= longest:
            raise ValueError(_too_long(length, what, longest, why))

    def _allowed(self, batch: int, run: Blocks | None) -> list[tuple[int, str]]:
        """Positions that a session of `batch` rows may have, each with the reason."""
        allowed = [(self.info.max_position, f"{self.info.name} has no more")]
        own, longest = self.limits.max_session_tokens, self._of_servers(run)
        if own is not None:
            allowed.append((own // batch, f"max_session_tokens is {own}"))
        if longest is not None:
            allowed.append((longest // batch, f"the servers take sessions of {longest} tokens"))
        return allowed

    def _of_servers(self, run: Blocks | None) -> int | None:
        """Tokens of the longest session of any chain; None where no server has announced a bound."""
        spans = self.last_view().spans(self.info.revision, self.info.blocks)
        return longest_session(suitable(spans, self.constraints), run or Blocks(0, self.info.blocks))


def check_room(length: int, what: str, max_length: int) -> None:
    """Raises ValueError where a conversation of `max_length` tokens cannot have `length`."""
    if not 0 < length <= max_length:
        raise ValueError(_too_long(length, what, max_length, f"the conversation was opened for {max_length}"))


def _too_long(length: int, what: str, longest: int, why: str) -> str:
    return f"{what} make {length} positions, 1 to {longest} are allowed: {why}"
