"""Which request begins next: a pure queue that is fair between callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from client.gateway.door.limits import QueueLimits


class QueueFull(Exception):
    """Neither a place to compute nor a place to wait is free."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request.  weight: the answers that it computes at a time.  number: of its arrival."""

    caller: str
    weight: int
    number: int


@dataclass(frozen=True, slots=True)
class Change:
    """The outcome of an event: requests that begin now, and those that have to go."""

    begin: tuple[Ticket, ...] = ()
    leave: tuple[Ticket, ...] = ()


@dataclass(slots=True)
class Admission:
    """The requests that compute, and those that wait.

    Promises, checked by tests/unit/test_gateway_admission.py:
      * the answers that are computed are never more than `max_concurrent`, the requests that wait never more
        than `max_queued`;
      * the next to begin is a request of the caller with the fewest answers under way; of several callers
        that of the one whose last turn is longest ago, and of one caller's the first to come;
      * nobody waits while the next in turn would fit;
      * where all places to wait are in use, the caller that has most gives its newest up to a caller that
        has fewer; a caller that has as many as the others is refused.
    """

    limits: QueueLimits = field(default_factory=QueueLimits)
    _computing: dict[Ticket, None] = field(default_factory=dict)
    _waiting: dict[Ticket, None] = field(default_factory=dict)  # in the order of arrival
    _arrivals: int = 0
    _turns: dict[str, int] = field(default_factory=dict)  # the last one of each caller that is here
    _turn: int = 0

    @property
    def computing(self) -> int:
        """Answers that are computed now."""
        return sum(ticket.weight for ticket in self._computing)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def weight_of(self, choices: int) -> int:
        """The weight of a request for so many answers."""
        return max(1, min(choices, self.limits.max_concurrent))

    def enter(self, caller: str, weight: int = 1) -> tuple[Ticket, Change]:
        """A request comes.  Raises QueueFull."""
        ticket = Ticket(caller, weight, self._arrivals)
        leave: tuple[Ticket, ...] = ()
        if not self._waiting and self._fits(ticket):
            pass
        elif len(self._waiting) >= self.limits.max_queued:
            leave = (self._victim(caller),)
            del self._waiting[leave[0]]
        self._arrivals += 1
        self._waiting[ticket] = None
        return ticket, Change(self._next(), leave)

    def leave(self, ticket: Ticket) -> Change:
        """A request has ended, or does not wait any longer; a second call changes nothing."""
        self._computing.pop(ticket, None)
        self._waiting.pop(ticket, None)
        change = Change(self._next())
        here = {each.caller for each in (*self._computing, *self._waiting)}
        self._turns = {caller: turn for caller, turn in self._turns.items() if caller in here}
        return change

    def _fits(self, ticket: Ticket) -> bool:
        return self.computing + ticket.weight <= self.limits.max_concurrent

    def _next(self) -> tuple[Ticket, ...]:
        begin: list[Ticket] = []
        while self._waiting:
            under_way: Counter[str] = Counter()
            for each in self._computing:
                under_way[each.caller] += each.weight
            first = min(self._waiting, key=partial(self._rank, under_way))
            if not self._fits(first):
                break
            del self._waiting[first]
            self._computing[first] = None
            self._turn += 1
            self._turns[first.caller] = self._turn
            begin.append(first)
        return tuple(begin)

    def _rank(self, under_way: Mapping[str, int], ticket: Ticket) -> tuple[int, int, int]:
        return under_way[ticket.caller], self._turns.get(ticket.caller, 0), ticket.number

    def _victim(self, caller: str) -> Ticket:
        """The request that gives its place to one of `caller`.  Raises QueueFull."""
        places = Counter(each.caller for each in self._waiting)
        most = max(places.values(), default=0)
        if places[caller] + 1 >= most or not most:
            raise QueueFull
        return next(each for each in reversed(self._waiting) if places[each.caller] == most)
