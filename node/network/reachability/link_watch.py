"""What connections tell of the way to this node: a router may have changed, or let nobody in any more."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

STEADY_SECONDS = 20.0  # after which a connection counts: those of dials back and of visits end before
SILENCE_SECONDS = 15.0  # without a connection of others: neighbours that lost one come back at once
PAUSE_SECONDS = 120.0  # between two silences, whatever comes and goes


@dataclass(slots=True)
class LinkWatch:
    """Says when this node should ask anew whether others reach it.  Pure; times are the caller's clock.

    Promises, checked by tests/unit/test_link_watch.py:
      * when the last steady connection of its own has ended and it reaches others again: it may be elsewhere;
      * when others have opened no connection for SILENCE_SECONDS, where they once had, and the node still
        reaches them: at most once in PAUSE_SECONDS;
      * else never: connections that come and go mean nothing.
    """

    _since: dict[Hashable, float] = field(default_factory=dict)  # of each live connection
    _was_steady: bool = False
    _others_came: bool = False
    _silent_since: float | None = None
    _pause_until: float = 0.0

    def why_ask(
        self, inbound: Collection[Hashable], outbound: Collection[Hashable], now: float
    ) -> str | None:
        """Why this node should ask now; None: it need not.

        inbound, outbound: the live connections, or names of them, by the side that opened them.
        """
        live = [*inbound, *outbound]
        self._since = {link: self._since.get(link, now) for link in live}
        steady = {link for link, since in self._since.items() if now - since >= STEADY_SECONDS}
        reason = self._silence(bool(inbound), bool(steady.intersection(inbound)), bool(outbound), now)
        if steady.intersection(outbound):
            self._was_steady = True
        elif self._was_steady and outbound:
            self._was_steady = False
            reason = "all its connections to others have ended, and new ones have begun"
        return reason

    def _silence(self, others_here: bool, steady: bool, reaches: bool, now: float) -> str | None:
        self._others_came = self._others_came or steady
        if others_here or not reaches or not self._others_came:
            self._silent_since = None
            return None
        if self._silent_since is None:
            self._silent_since = now
        if now - self._silent_since < SILENCE_SECONDS or now < self._pause_until:
            return None
        self._others_came, self._silent_since, self._pause_until = False, None, now + PAUSE_SECONDS
        return "nobody comes to this node any more"
