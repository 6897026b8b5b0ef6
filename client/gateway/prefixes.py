"""Conversations kept for their next turn, so that a long chat begins as fast as a short one: pure.

The next turn of a chat begins with all that was said before, whose keys and values the servers have in their
caches already.  A kept conversation is given only to the caller whose it was: otherwise the time to the
first token would tell one caller what another one has asked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from client.api import ConversationLike
from client.gateway.door.limits import PrefixLimits


@dataclass(eq=False, slots=True)
class Kept:
    """A conversation.

    owner: its caller, its model and its servers; tokens: in the caches of its servers.
    max_length: tokens that it was opened for.  idle_since: on the pool's clock.
    """

    owner: Hashable
    conversation: ConversationLike
    max_length: int
    tokens: list[int] = field(default_factory=list)
    idle_since: float = 0.0

    def rest(self, tokens: list[int], now: float) -> None:
        """It is idle from now on, with these tokens in its caches."""
        self.tokens, self.idle_since = tokens, now


@dataclass(slots=True)
class PrefixPool:
    """The kept conversations; whoever gets one out of a method closes it or uses it.

    Promises, checked by tests/unit/test_gateway_prefixes.py:
      * there are never more conversations or tokens than the limits allow; the oldest go first;
      * a conversation is given to its owner alone, and to one request at a time;
      * of several the one with the longest common prefix is given, then the one that loses fewest tokens;
      * none is given after `idle_seconds`.
    """

    limits: PrefixLimits = field(default_factory=PrefixLimits)
    _kept: list[Kept] = field(default_factory=list)  # the longest idle first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Tokens of all kept conversations."""
        return sum(len(kept.tokens) for kept in self._kept)

    @property
    def next_end(self) -> float | None:
        """When the next conversation has been idle for too long; None where there is none."""
        return self._kept[0].idle_since + self.limits.idle_seconds if self._kept else None

    def take(self, owner: Hashable, tokens: Sequence[int], length: int, now: float) -> Kept | None:
        """The conversation to go on with for a prompt of these tokens; it is the caller's from now on.

        length: of prompt and answer together.
        """
        best, rank = None, (self.limits.least_tokens - 1, 0)
        for kept in self._kept:
            alive = now < kept.idle_since + self.limits.idle_seconds
            if alive and kept.owner == owner and kept.max_length >= length:
                common = common_length(kept.tokens, tokens)
                found = (common, common - len(kept.tokens))
                if common >= self.limits.least_tokens and found > rank:
                    best, rank = kept, found
        if best is not None:
            self._kept.remove(best)
        return best

    def keep(self, kept: Kept, tokens: list[int], now: float, most: int | None = None) -> list[Kept]:
        """Keep a conversation; those that have to go for it, perhaps itself.

        tokens: in its caches.  most: tokens of all kept conversations, where that is less than the limit.
        """
        kept.rest(tokens, now)
        most = min(self.limits.max_tokens, self.limits.max_tokens if most is None else most)
        if len(kept.tokens) < self.limits.least_tokens:
            return [kept]
        self._kept.append(kept)
        gone: list[Kept] = []
        while len(self._kept) > self.limits.max_conversations or self.tokens > most:
            # One that is too large alone goes itself, not all the others before it.
            alone = len(kept.tokens) > most and kept in self._kept
            gone.append(self._kept.pop(-1 if alone else 0))
        return gone

    def expire(self, now: float) -> list[Kept]:
        """Those that have been idle for too long."""
        gone = [kept for kept in self._kept if now >= kept.idle_since + self.limits.idle_seconds]
        self._kept = [kept for kept in self._kept if kept not in gone]
        return gone

    def clear(self) -> list[Kept]:
        """All of them."""
        gone, self._kept = self._kept, []
        return gone


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix; O(n log n) in C for lists, by comparing slices."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # one[:low] == other[:low], one[:high] != other[:high]
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
