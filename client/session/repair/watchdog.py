"""When hops are asked how far a late step is, and which of them has failed.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from client.session.hop_state import HopState
from client.session.repair.lost_time import REPLAYED_SHARE, LostTime
from client.session.steps import Pending
from routing.names import PeerId
from tensor_codec.messages.contract import REPLAY_TOKENS

MIN_HOP_SECONDS = 1.0  # a hop's deadline is 4 x p95 of its recent steps, within these two
MAX_HOP_SECONDS = 30.0
DEADLINE_FACTOR = 4.0
ASK_AT = 0.25  # of the deadline: then every hop is asked how far it is
MAX_DOUBLINGS = 5  # of the time that a hop may be silent


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look at a late step has shown.

    ask: hops to be asked how far they are.  silent: hops that did not answer, and since when no sign of
    them, in seconds.  stuck: a hop that has lost the step.  busy: a hop that works on something else for
    too long.  waited: seconds without progress, of a hop that is stuck or busy.
    """

    ask: Sequence[HopState] = ()
    silent: Sequence[tuple[HopState, float]] = ()
    stuck: HopState | None = None
    busy: HopState | None = None
    waited: float = 0.0


@dataclass(slots=True)
class Watchdog:
    """Looks after steps that are late.

    Promises, checked by tests/unit/test_watchdog.py:
      * a hop's deadline is four times the 95th percentile of the recent steps, from 1 to 30 s;
      * hops are asked after a quarter of the deadline, and none is silent before the rest has passed;
      * a hop that was given up for its silence has twice the time after each such fault, 30 s at most;
      * a step that makes progress is waited for; one that makes none is lost at a hop that is idle, and is
        waited for at a busy one as long as its positions may take.

    lost_time: of the session's recent steps.
    """

    lost_time: LostTime
    silences: Counter[PeerId] = field(default_factory=Counter)

    def hop_seconds(self) -> float:
        """How long a hop may be silent: the deadline of one hop's work on a step."""
        recent = self.lost_time.recent
        if not recent:
            return MIN_HOP_SECONDS
        p95 = sorted(recent)[int(0.95 * (len(recent) - 1))]
        return min(max(DEADLINE_FACTOR * p95, MIN_HOP_SECONDS), MAX_HOP_SECONDS)

    def first_look(self, now: float) -> float:
        """When the hops are to be asked for a step that is all right now."""
        return now + self.hop_seconds() * ASK_AT

    def look(
        self, pending: Pending, hops: Sequence[HopState], now: float, *, refilling: bool, expected: float
    ) -> Findings:
        """Look after a late step, and set its next look.

        refilling: a replay is before the step.  expected: seconds that the chain promised for one step.
        """
        watch, seconds = pending.watch, self.hop_seconds()
        if not watch.asked:
            watch.ask(max(watch.since + seconds, now + (1 - ASK_AT) * seconds))
            return Findings(ask=hops)
        asked = [hop for hop in hops if hop.asked_at is not None]
        silent = [
            hop
            for hop in hops
            if hop.asked_at is not None and now - hop.asked_at >= 0.99 * self._answer_seconds(hop)
        ]
        for hop in silent:
            self.silences[hop.hop.peer] += 1
        if asked and not silent:
            watch.wait(now + seconds / 2)
            return Findings()
        found = Findings(silent=[(hop, now - watch.since) for hop in silent])
        if not asked:
            found = self._find_the_step(pending, hops, now, refilling=refilling, expected=expected)
        watch.postpone(now, self.first_look(now))
        return found

    def _answer_seconds(self, hop: HopState) -> float:
        """Seconds that a hop has to answer; twice as many after each time that it was given up for silence.

        A distant hop over a bad line would else never have the time to answer, where there is no other.
        """
        times: int = 2 ** min(self.silences[hop.hop.peer], MAX_DOUBLINGS)
        return min((1 - ASK_AT) * self.hop_seconds() * times, MAX_HOP_SECONDS)

    def _find_the_step(
        self, pending: Pending, hops: Sequence[HopState], now: float, *, refilling: bool, expected: float
    ) -> Findings:
        """All hops answer: wait while a late step makes progress or is queued; else it was lost."""
        progress = tuple((hop.here.length, hop.here.step) for hop in hops if hop.here is not None)
        if pending.watch.saw(progress, now, refilling=refilling):
            return Findings()
        hop = hops[min(_first_without(pending.step, hops), len(hops) - 1)]
        waited = now - pending.watch.moved_at
        if hop.here is None or hop.here.waiting <= 0 or waited > MAX_HOP_SECONDS:
            return Findings(stuck=hop, waited=waited)
        if waited > self._busy_seconds(pending, refilling=refilling, expected=expected):
            return Findings(busy=hop, waited=waited)
        return Findings()

    def _busy_seconds(self, pending: Pending, *, refilling: bool, expected: float) -> float:
        """How long a hop may work on one thing before another hop is looked for."""
        positions = pending.what.tokens
        if refilling:
            positions = max(positions, min(REPLAY_TOKENS, pending.what.position))
        seconds = DEADLINE_FACTOR * (self.lost_time.usual() or expected)
        seconds *= 1 + REPLAYED_SHARE * (positions - 1)
        return min(max(seconds, self.hop_seconds()), MAX_HOP_SECONDS)


def _first_without(step: int, hops: Sequence[HopState]) -> int:
    """The first hop that has not computed a step, by what the hops have said; len(hops) if there is none."""
    for index, hop in enumerate(hops):
        if hop.here is None or hop.here.step is None or hop.here.step < step:
            return index
    return len(hops)
