"""The standbys of a session's hops, and how much of their caches is still true.  Pure.

A standby gets a hop's inputs a moment after the hop.  What it has is what the sender had at some step, which
it names; where a later step went back, the positions from there on are others by now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from client.session.hop_state import HopState
from client.session.repair.replay_plan import HopProgress
from routing.blocks import Blocks
from routing.names import PeerId

MAX_CUTS = 64  # that are remembered one by one
AVOIDED_SECONDS = 5.0  # for which a peer that failed as a standby is not asked again
MAX_AVOIDED = 64


@dataclass(slots=True)
class Standbys:
    """The standbys of one session.  Times are the caller's clock, in seconds.

    Promises, checked by tests/unit/test_standbys.py:
      * no position of a standby counts that a later step has replaced, whatever the standby has not seen;
      * a standby of no hop of the route is left;
      * memory is bounded, however often a session goes back.

    hops: alive or not, until the route's hops change.  epochs: of the route, in which each is fed; agreed: in
    which each knows its neighbours.
    """

    hops: list[HopState] = field(default_factory=list)
    epochs: dict[HopState, int] = field(default_factory=dict)
    agreed: dict[HopState, int] = field(default_factory=dict)
    _stop: int = 0  # of all positions sent
    _cuts: list[tuple[int, int]] = field(default_factory=list)  # (step, its position), both ascending
    _avoided: dict[PeerId, float] = field(default_factory=dict)  # until then

    @property
    def alive(self) -> list[HopState]:
        """Those that may take a hop's place."""
        return [hop for hop in self.hops if hop.alive]

    def fed_in(self, epoch: int) -> list[HopState]:
        """Those that are fed in this epoch."""
        return [hop for hop in self.alive if self.epochs.get(hop) == epoch]

    def of(self, blocks: Blocks) -> HopState | None:
        """The standby of a hop with these blocks."""
        return next((hop for hop in self.alive if hop.hop.blocks == blocks), None)

    def sent(self, step: int, position: int, tokens: int) -> None:
        """A step goes out; where it begins below the positions sent before, those are replaced."""
        if position < self._stop:
            while self._cuts and self._cuts[-1][1] >= position:
                self._cuts.pop()
            self._cuts.append((step, position))
            if len(self._cuts) > MAX_CUTS:  # the two oldest become one, that of the lower position
                (_, low), (late, _) = self._cuts[:2]
                self._cuts[:2] = [(late, low)]
        self._stop = position + tokens

    def checked(self, progress: HopProgress) -> HopProgress:
        """A hop's progress, with the number of positions that are still true where it was a standby."""
        if not progress.follows:
            return progress
        seen = -1 if progress.step is None else progress.step
        later = [position for step, position in self._cuts if step > seen]
        return replace(progress, valid=min(later, default=None))

    def add(self, hop: HopState, epoch: int) -> None:
        """A peer has become a standby, in this epoch of the route."""
        self.hops.append(hop)
        self.agree(hop, epoch)

    def agree(self, hop: HopState, epoch: int) -> None:
        """It knows its neighbours in this epoch."""
        self.agreed[hop] = epoch

    def fed(self, hop: HopState, epoch: int) -> None:
        """It is fed in this epoch of the route."""
        self.epochs[hop] = epoch

    def promote(self, route: Collection[HopState]) -> None:
        """These hops are the route's now."""
        for hop in [hop for hop in self.hops if hop in route]:
            self._forget(hop)

    def leave_others(self, route: Sequence[HopState]) -> list[HopState]:
        """Leave those that have failed, and those of which the route has no hop."""
        wanted = {hop.hop.blocks for hop in route}
        leave = [hop for hop in self.hops if not hop.alive or hop.hop.blocks not in wanted]
        return self._leave(leave)

    def give_up(self) -> list[HopState]:
        """Leave all."""
        return self._leave(list(self.hops))

    def lost(self, hop: HopState, now: float) -> None:
        """A hop has failed: it is not asked again for a while, where it was a standby."""
        if hop in self.hops:
            self.avoid(hop.hop.peer, now)

    def avoid(self, peer: PeerId, now: float) -> None:
        """This peer cannot be a standby now."""
        self._avoided.pop(peer, None)
        self._avoided[peer] = now + AVOIDED_SECONDS
        if len(self._avoided) > MAX_AVOIDED:
            del self._avoided[next(iter(self._avoided))]

    def avoided(self, now: float) -> frozenset[PeerId]:
        """Peers that are not asked now."""
        return frozenset(peer for peer, until in self._avoided.items() if until > now)

    def _leave(self, hops: Iterable[HopState]) -> list[HopState]:
        left = list(hops)
        for hop in left:
            hop.close()
            self._forget(hop)
        return left

    def _forget(self, hop: HopState) -> None:
        self.hops.remove(hop)
        self.epochs.pop(hop, None)
        self.agreed.pop(hop, None)
