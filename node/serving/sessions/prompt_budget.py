"""The bytes of deep prompts that open sessions hold, of each peer, of each network prefix and of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from node.serving.fair_shares import counted, party_of
from node.serving.span_admission import SpanAdmission
from tensor_codec.errors import CacheFull, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.session import check_prompts, peek_open

AGAIN_SECONDS = 5.0  # a session must end first


def no_room() -> CacheFull:
    """The refusal of a session whose prompts make way for another's."""
    why = "others wait for room for prompts, of which your network holds more than its share"
    return CacheFull(why, AGAIN_SECONDS)


@dataclass(frozen=True, slots=True, eq=False)
class HeldPrompts:
    """The prompts of one session.  prefix: of its client's address; "" where it has none.

    give_way: ends the session, for this reason.
    """

    peer: str
    prefix: str
    size: int
    give_way: Callable[[CacheFull], None] = lambda _: None


@dataclass(slots=True)
class PromptBudget:
    """Admits prompts up to `max_prompt_bytes`, and those of one peer up to `max_prompt_bytes_per_peer`.

    Where all are in use, the prefix that has most ends its youngest sessions for one of a prefix that has
    less with the new one.  In one prefix nobody makes way: honest peers share an address too.  A peer with a
    share of its own has that part of `max_prompt_bytes`, and stands beside the prefixes.
    """

    limits: Limits
    _held: dict[HeldPrompts, None] = field(default_factory=dict)  # the oldest first

    @property
    def used(self) -> int:
        """Bytes that sessions hold now."""
        return sum(each.size for each in self._held)

    def check(self, new: HeldPrompts) -> list[HeldPrompts]:
        """The prompts that have to make way for these.  Raises CacheFull where there is no room."""
        used = sum(each.size for each in self._held if each.peer == new.peer)
        limits = self.limits
        most = limits.part_of(new.peer, limits.max_prompt_bytes, limits.max_prompt_bytes_per_peer)
        victims = self._in_the_way(new)
        if victims is None and new.size <= most - used:
            used, most = self.used, limits.max_prompt_bytes
        if victims is None or new.size > most - used:
            free = max(0, most - used)
            raise CacheFull(f"prompts of {new.size} bytes, {free} of {most} are free", AGAIN_SECONDS)
        return victims

    def judge(
        self, admission: SpanAdmission, peer: str, prefix: str, beginning: bytes, size: int
    ) -> Refused | None:
        """Whether the prompts of an Open are taken, before they have come; the reason if not.

        beginning: of its frame, with the header; size: of all of it.  Raises MessageError.
        """
        opened, body_bytes = peek_open(beginning, size)
        try:
            admission.admits(opened.spec)
            check_prompts(opened, admission.spec.hidden, body_bytes)
            self.check(HeldPrompts(peer, prefix, body_bytes))
        except Refused as refusal:
            return refusal
        return None

    @contextmanager
    def hold(self, new: HeldPrompts) -> Iterator[None]:
        """Count a session's prompts within the context, and have others make way.  Raises CacheFull."""
        for victim in self.check(new):
            del self._held[victim]
            victim.give_way(no_room())
        self._held[new] = None
        try:
            yield
        finally:
            self._held.pop(new, None)

    def _in_the_way(self, new: HeldPrompts) -> list[HeldPrompts] | None:
        """The youngest prompts of the prefixes with most, until the new ones fit; None: they never do."""
        capacity, own_shares = self.limits.max_prompt_bytes, self.limits.own_shares
        missing = new.size - (capacity - self.used)
        asks = party_of(new.peer, new.prefix, own_shares)
        counts: Counter[str] = Counter()
        for each in self._held:
            counts[party_of(each.peer, each.prefix, own_shares)] += each.size
        own, victims = counts.pop(asks, 0) + new.size, list[HeldPrompts]()

        def weight(party: str, size: int) -> float:
            return counted(party, size, capacity, own_shares)

        while missing > 0:
            largest = max(counts, key=lambda party: weight(party, counts[party]), default="")
            if not asks or weight(largest, counts[largest]) <= weight(asks, own):
                return None
            youngest = next(
                each
                for each in reversed(self._held)
                if party_of(each.peer, each.prefix, own_shares) == largest and each not in victims
            )
            victims.append(youngest)
            counts[largest] -= youngest.size
            missing -= youngest.size
        return victims
