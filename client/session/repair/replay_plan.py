"""The least recomputation when hops of a session are replaced.  Pure.

Each hop of the new route reports its progress: the positions in its cache, its last computed step, and the
outputs in its journal.  A new hop has nothing.  `plan` computes the valid part of every cache and the
replay of every sender.  After it every hop holds the positions before the first step without an answer.
That step then goes out again.

Three cases besides the plain one (one hop died, and the hop before it replays):

* several died: the sender of a hop may be new itself.  It is fed first and computes, and its outputs go on
  to hops that lack them;
* a sender's journal does not reach back far enough: it is cut to its successor's positions, and the hop
  before it feeds it; the client, which has all inputs, feeds the first hop;
* a model whose cache cannot go back (a convolution's state): a hop beyond the position begins again.

Where rows are reordered, a replay brings them in the order before the first step that comes again.  A cache
whose rows are in another order, which cannot be undone, begins again: one that lacks an order, and one that
has the order of a step that nobody waits for any more.  The order of the step that comes again may be in a
whole cache already: it is not applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensor_codec.messages.contract import StepRange


@dataclass(frozen=True, slots=True)
class HopProgress:
    """The progress of a hop: see `tensor_codec.messages.session.Relinked`.

    orders: None where the hop cannot reorder rows.
    follows: it was a standby until now, with the inputs of all steps up to `step` and an answer to none.
    valid: its later positions were replaced since then; None: no position was.
    """

    length: int = 0
    kept: int = 0
    step: int | None = None
    cut: bool = True
    orders: int | None = None
    follows: bool = False
    valid: int | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """A step that was sent and has no answer, given up or not."""

    step: int
    what: StepRange


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The position from which a new route resumes.

    position: of the first step that will be sent again, or the session's length.
    sent: steps without an answer, oldest first.  again: the numbers of those that will be sent again.
    step: the first step that comes after the replay.  ordered: the last one before it that reordered rows,
    -1 if none did.
    """

    position: int
    sent: Sequence[Sent]
    again: Sequence[int] = ()
    step: int = 0
    ordered: int = -1


@dataclass(frozen=True, slots=True)
class HopOrder:
    """The order to a hop: see `tensor_codec.messages.session.Resume`."""

    length: int
    has: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """orders: for each hop.  client_from: the client sends positions [client_from, position) again."""

    orders: tuple[HopOrder, ...]
    client_from: int

    @property
    def replays(self) -> tuple[tuple[int, int, int], ...]:
        """(sender's place in the chain, start, stop) of every replay that a hop makes."""
        return tuple(
            (index, order.has, order.stop)
            for index, order in enumerate(self.orders)
            if order.has < order.stop
        )


def plan(standings: Sequence[HopProgress], point: ResumePoint) -> Plan:
    """The plan that brings all hops to a point with the least work.

    A hop that has computed the only step that comes again, and nothing after it, keeps it: it answers
    from memory.
    """
    ahead = [_is_ahead(standing, point) for standing in standings]
    held = [
        good_length(standing, point) if one_on else _back_to(standing, good_length(standing, point), point)
        for standing, one_on in zip(standings, ahead, strict=True)
    ]
    for index in reversed(range(len(standings) - 1)):
        following = held[index + 1]
        if following < held[index] and standings[index].kept > following:
            held[index], ahead[index] = _back_to(standings[index], following, point), False
    has = [*held[1:], 0]
    orders = [
        HopOrder(
            length=standing.length if ahead[index] else held[index],
            has=has[index],
            stop=held[index] if index + 1 < len(standings) else 0,
        )
        for index, standing in enumerate(standings)
    ]
    return Plan(tuple(orders), held[0])


def good_length(standing: HopProgress, point: ResumePoint) -> int:
    """The number of valid positions of a hop's cache, up to the point."""
    good = min(standing.length, point.position)
    if standing.valid is not None:
        good = min(good, standing.valid)
    for one in point.sent:
        if standing.step is None or one.step > standing.step:
            good = min(good, one.what.position)  # a step that the hop has not seen would have cut there
    return good if _are_rows_in_place(standing, good, point) else 0


def _is_ahead(standing: HopProgress, point: ResumePoint) -> bool:
    """Whether the one step that comes again is the last computed step of this hop."""
    if len(point.again) != 1 or standing.follows:
        return False
    (number,) = point.again
    what = next(one.what for one in point.sent if one.step == number)
    return standing.step == number and standing.length == what.position + what.tokens


def _back_to(standing: HopProgress, length: int, point: ResumePoint) -> int:
    """The length that a hop can go back to."""
    if not _are_rows_in_place(standing, length, point):
        return 0
    return length if standing.cut or length == standing.length else 0


def _are_rows_in_place(standing: HopProgress, length: int, point: ResumePoint) -> bool:
    """Whether the rows of `length` positions of a hop's cache are in the order that a replay continues."""
    orders = standing.orders or 0
    if orders <= point.ordered:
        return False  # it lacks an order
    early = [one for one in point.sent if point.step <= one.step < orders and one.what.rows]
    return all(one.step in point.again and length == one.what.position for one in early)
