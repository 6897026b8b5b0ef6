"""Inbound silence: peers came to this node once and come no more, and it still gets through to them."""

from __future__ import annotations

from dataclasses import dataclass

SILENCE_SECONDS = 15.0  # a dead connection ends within 10 s (TCP_USER_TIMEOUT); neighbours come back at once


@dataclass(slots=True)
class InboundSilence:
    """Notices that a router or a firewall lets nobody in any more.  Pure; times are the caller's clock.

    Promises, checked by tests/unit/test_inbound_silence.py:
      * due once for each silence, SILENCE_SECONDS after the last inbound connection has ended;
      * a node to which nobody ever came is not due, nor one that reaches nobody itself.
    """

    _came: bool = False
    _since: float | None = None

    def is_due(self, inbound: int, outbound: int, now: float) -> bool:
        """Whether this node should ask now whether it is still reached.

        inbound, outbound: live connections, by the side that opened them.
        """
        if inbound or not outbound or not self._came:
            self._came = self._came or inbound > 0
            self._since = None
            return False
        if self._since is None:
            self._since = now
        if now - self._since < SILENCE_SECONDS:
            return False
        self._came, self._since = False, None
        return True
