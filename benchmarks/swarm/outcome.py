"""The result of a simulated swarm: blocks without a server, moves, and the share of the bound."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass, field

from benchmarks.swarm.models import Plan

RESTORED_SECONDS = 60.0  # a block that lost its last server should have one within this time plus a load


@dataclass(slots=True)
class Gap:
    """A block without a server.  Seconds of the simulated time: since the loss, and since records show it.

    stuck: seconds without a remedy: all memory together is too little, or no plan closes the gap.
    """

    since: float
    known: float | None = None
    stuck: float = 0.0
    stuck_since: float | None = None


@dataclass(slots=True)
class Repair:
    """A block that has a server again, or none until the end.

    Seconds: in all, since records showed it, of the last load, and without a remedy.
    """

    total: float
    known: float
    load: float
    stuck: float

    @property
    def late(self) -> bool:
        """Whether it took too long, counted from the crash."""
        return self.total > RESTORED_SECONDS + self.load

    @property
    def impossible(self) -> bool:
        """Whether it is late only by the time without a remedy."""
        return self.total - self.stuck <= RESTORED_SECONDS + self.load


@dataclass(slots=True)
class Outcome:
    """The measurements.  shares: of the bound, while observed; seconds of the simulated time.

    rank_ms, turns_ms: of the part that is equal for all servers with one view; own_ms: of the other part of
    a decision.
    """

    shares: list[float] = field(default_factory=list)
    at_rest: float = 0.0
    held_once: int = 0  # blocks, at rest
    uncovered_s: float = 0.0
    repairs: list[Repair] = field(default_factory=list)
    unrepaired: list[Repair] = field(default_factory=list)  # at the end; load: 0
    observed_s: float = 0.0
    moves: int = 0
    gaps_opened: int = 0
    loaded: int = 0
    rank_ms: list[float] = field(default_factory=list)
    turns_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)


class GapAccount:
    """Keeps account of the time in which a block has no server, block by block.

    open: the gaps of now, by block.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.open: dict[int, Gap] = {}
        self._outcome = outcome
        self._since = 0.0

    def look(self, now: float, blocks: Collection[int], unannounced: Collection[int], load: float) -> None:
        """Open and close gaps.

        blocks: without a server now.  unannounced: blocks that no record covers.  load: seconds, of the
        server that came online last.
        """
        if bool(blocks) != bool(self.open):
            self._outcome.uncovered_s += now - self._since if self.open else 0.0
            self._since = now
        for block in blocks:
            gap = self.open.setdefault(block, Gap(now))
            gap.known = now if gap.known is None and block in unannounced else gap.known
        for block in [block for block in self.open if block not in blocks]:
            self._outcome.repairs.append(_repair(self.open.pop(block), now, load))

    def hopeless(self, now: float, blocks: Collection[int]) -> None:
        """Note the open blocks that no server can take at this moment, by any plan."""
        for block, gap in self.open.items():
            if block in blocks and gap.stuck_since is None:
                gap.stuck_since = now
            elif block not in blocks and gap.stuck_since is not None:
                gap.stuck, gap.stuck_since = gap.stuck + now - gap.stuck_since, None

    def pause(self, now: float) -> None:
        """Account for the time up to a moment; open gaps stay open."""
        if self.open:
            self._outcome.uncovered_s += now - self._since
            self._since = now
        self._outcome.unrepaired = [_repair(gap, now, 0.0) for gap in self.open.values()]


def _repair(gap: Gap, now: float, load: float) -> Repair:
    known = 0.0 if gap.known is None else now - gap.known
    stuck = gap.stuck + (0.0 if gap.stuck_since is None else now - gap.stuck_since)
    return Repair(now - gap.since, known, load, stuck)


def summary(plan: Plan, outcomes: list[Outcome]) -> dict[str, object]:
    """The figures of all seeds of one rule.

    coverage_restored_s: from the loss of a block's last server until it has a server again.
    coverage_late: blocks without a server for more than RESTORED_SECONDS plus the load of the server that
        closed the gap; coverage_late_impossible: of these, late only by the time without a remedy.
    coverage_reaction_s: from the end of the last record with a server, without the load of the server that
        closed the gap.
    """
    setup = sorted(statistics.fmean(outcome.shares) for outcome in outcomes)
    hours = sum(outcome.observed_s for outcome in outcomes) / 3600
    ranks = [ms for outcome in outcomes for ms in outcome.rank_ms] or [0.0]
    plans = [ms for outcome in outcomes for ms in outcome.turns_ms] or [0.0]
    shared = statistics.fmean(ranks) + statistics.fmean(plans)
    own = sorted(ms for outcome in outcomes for ms in outcome.own_ms)
    repairs = [repair for outcome in outcomes for repair in outcome.repairs]
    restored = sorted(repair.total for repair in repairs) or [0.0]
    still_open = [repair for outcome in outcomes for repair in outcome.unrepaired]
    late = [repair for repair in repairs + still_open if repair.late]
    reactions = sorted(max(0.0, repair.known - repair.load) for repair in repairs) or [0.0]
    return {
        "share_of_bound_mean": statistics.fmean(setup),
        "share_of_bound_p5": setup[int(0.05 * len(setup))],
        "share_of_bound_min": setup[0],
        "blocks_held_once": statistics.fmean(outcome.held_once for outcome in outcomes),
        "at_rest_mean": statistics.fmean(outcome.at_rest for outcome in outcomes),
        "share_at_end_mean": statistics.fmean(outcome.shares[-1] for outcome in outcomes),
        "uncovered_s": sum(outcome.uncovered_s for outcome in outcomes) / len(outcomes),
        "gaps_opened_by_moves": sum(outcome.gaps_opened for outcome in outcomes),
        "gaps": len(repairs) + len(still_open),
        "coverage_late": len(late),
        "coverage_late_impossible": sum(repair.impossible for repair in late),
        "coverage_late_s": sorted(
            (round(repair.total), round(repair.load), round(repair.stuck)) for repair in late
        ),
        "coverage_restored_s_p95": restored[int(0.95 * len(restored))],
        "coverage_restored_s_max": restored[-1],
        "coverage_load_s_max": max((repair.load for repair in repairs), default=0.0),
        "coverage_reaction_s_p95": reactions[int(0.95 * len(reactions))],
        "coverage_reaction_s_max": reactions[-1],
        "coverage_reactions_over_60_s": sum(seconds > 60 for seconds in reactions),
        "moves_per_server_hour": sum(outcome.moves for outcome in outcomes) / hours / plan.servers,
        "blocks_loaded_per_hour": sum(outcome.loaded for outcome in outcomes) / hours,
        "decision_ms": shared + statistics.fmean(own),
        "decision_ms_p99": shared + own[int(0.99 * len(own))],
        "decision_ms_max": max(ranks) + max(plans) + own[-1],
    }
