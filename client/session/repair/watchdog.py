"""The time of questions to hops about a late step, and the detection of a failed hop.  Pure."""

from __future__ import annotations

import math
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
ASK_AT = 0.25  # of the deadline: then every hop is asked for its progress
MAX_DOUBLINGS = 5  # of the time that a hop may be silent
CRAWL_FACTOR = 2.0  # times what its positions may take, a step that makes some progress is late too
SPARE_MOVES = 2  # of a hop, beyond the step and the parts of a replay: steps that were given up may grow too


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of a look at a late step.

    ask: hops to ask for their progress.  silent: hops that did not answer, with the seconds of their
    silence.  stuck: a hop that has lost the step, or had it for too long.  before: the hop that, by its own
    word, has passed the step on to the stuck one.  busy: a hop that works on something else for too long.
    waited: seconds without progress, of a hop that is stuck or busy.  held: those for which a busy hop has
    had the step.
    """

    ask: Sequence[HopState] = ()
    silent: Sequence[tuple[HopState, float]] = ()
    stuck: HopState | None = None
    before: HopState | None = None
    busy: HopState | None = None
    waited: float = 0.0
    held: float = 0.0


@dataclass(slots=True)
class Watchdog:
    """Watches late steps.

    Promises, checked by tests/unit/test_watchdog.py:
      * a hop's deadline is four times the 95th percentile of the recent steps, from 1 to 30 s;
      * hops are asked after a quarter of the deadline, and none counts as silent before the deadline has
      passed;
      * a hop that was given up for its silence has twice the time after each of these faults, 30 s at most;
      * a step that makes progress is waited for, for twice the time that its positions may take where another
        hop can take it; a step without progress is lost at an idle hop, and waits
        at a busy hop for the time that its positions may take;
      * only growth up to what was sent is progress, and as often as honest work grows;
      * a hop has a step for 30 s at most, and for as long again for each part of a replay, whatever it says.

    lost_time: of the session's recent steps.
    """

    lost_time: LostTime
    silences: Counter[PeerId] = field(default_factory=Counter)

    def hop_seconds(self) -> float:
        """The longest silence of a hop: the deadline of one hop's work on a step."""
        recent = self.lost_time.recent
        if not recent:
            return MIN_HOP_SECONDS
        p95 = sorted(recent)[int(0.95 * (len(recent) - 1))]
        return min(max(DEADLINE_FACTOR * p95, MIN_HOP_SECONDS), MAX_HOP_SECONDS)

    def first_look(self, now: float) -> float:
        """The time of the next question for a step without a fault now."""
        return now + self.hop_seconds() * ASK_AT

    def look(
        self,
        pending: Pending,
        hops: Sequence[HopState],
        now: float,
        *,
        refilling: bool,
        expected: float,
        part: int = REPLAY_TOKENS,
    ) -> Findings:
        """Look at a late step, and set its next look.

        refilling: a replay is before the step, in parts of `part` positions.
        expected: seconds that the chain promised for one step.
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
            parts = math.ceil(pending.what.position / part) if refilling else 0
            found = self._find_the_step(pending, hops, now, parts, expected)
        watch.postpone(now, self.first_look(now))
        return found

    def _answer_seconds(self, hop: HopState) -> float:
        """Seconds for a hop's answer; twice as many after each time that it was given up for silence.

        Otherwise a distant hop over a bad line would never have the time to answer, where there is no other.
        """
        times: int = 2 ** min(self.silences[hop.hop.peer], MAX_DOUBLINGS)
        return min((1 - ASK_AT) * self.hop_seconds() * times, MAX_HOP_SECONDS)

    def _find_the_step(
        self, pending: Pending, hops: Sequence[HopState], now: float, parts: int, expected: float
    ) -> Findings:
        """All hops answer: wait while a late step makes progress or is queued; else it was lost.

        parts: of the replay before the step.
        """
        watch, refilling = pending.watch, parts > 0
        reports = {hop.hop.peer: _report(hop, pending) for hop in hops}
        moved = watch.saw(reports, now, refilling=refilling, most_moves=parts + 1 + SPARE_MOVES)
        index = _first_without(pending, hops)
        hop = hops[min(index, len(hops) - 1)]
        held = now - watch.held_since(hop.hop.peer, now)
        if held > MAX_HOP_SECONDS * (1 + parts):
            return Findings(stuck=hop, waited=held)
        patience = self._busy_seconds(pending, refilling=refilling, expected=expected)
        works = hop.here is not None and hop.here.waiting > 0
        if moved:
            crawls = works and not refilling and held > CRAWL_FACTOR * patience
            return Findings(busy=hop, waited=held, held=held) if crawls else Findings()
        waited = now - watch.moved_at
        if not works:
            before = hops[index - 1] if 0 < index < len(hops) else None
            return Findings(stuck=hop, before=before, waited=waited)
        if waited > MAX_HOP_SECONDS:
            return Findings(stuck=hop, waited=waited)
        if waited > patience:
            return Findings(busy=hop, waited=waited, held=held)
        return Findings()

    def _busy_seconds(self, pending: Pending, *, refilling: bool, expected: float) -> float:
        """The longest work of a hop on one thing before a search for another hop."""
        positions = pending.what.tokens
        if refilling:
            positions = max(positions, min(REPLAY_TOKENS, pending.what.position))
        seconds = DEADLINE_FACTOR * (self.lost_time.usual() or expected)
        seconds *= 1 + REPLAYED_SHARE * (positions - 1)
        return min(max(seconds, self.hop_seconds()), MAX_HOP_SECONDS)


def _report(hop: HopState, pending: Pending) -> tuple[int, int]:
    """The last step and the positions that a hop reports, up to those that were sent."""
    if hop.here is None:
        return -1, 0
    step = -1 if hop.here.step is None else hop.here.step
    return min(step, pending.step), min(hop.here.length, pending.what.position + pending.what.tokens)


def _first_without(pending: Pending, hops: Sequence[HopState]) -> int:
    """The first hop that has not computed a step, by all its reports; len(hops) if there is none."""
    for index, hop in enumerate(hops):
        if pending.watch.furthest[hop.hop.peer][0] < pending.step:
            return index
    return len(hops)
