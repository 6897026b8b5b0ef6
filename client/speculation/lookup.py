"""Prompt lookup: the tokens that followed when the last few tokens were written before.  Pure.

Text that is edited, quoted or summed up repeats runs of its prompt.  So the longest end of the text that has
occurred before is looked up, and the tokens after it are proposed (prompt lookup decoding, Saxena 2023; LLMA,
arXiv:2304.04487).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHORTEST, LONGEST = 2, 5  # tokens of an end that is looked up
FARTHEST = 24  # tokens that are compared backwards, to say how long a match is


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow.  matched: how many tokens before them agree, 0 where nothing says so."""

    tokens: tuple[int, ...] = ()
    matched: int = 0


@dataclass(slots=True)
class NgramIndex:
    """The tokens of a text, with the last place of each run of SHORTEST to LONGEST tokens.

    Promises, checked by tests/unit/test_lookup.py:
      * a proposal follows the longest end of the text, up to LONGEST tokens, that occurred before, at its
        last place before;
      * it is as long as was asked for: where the place is near the end, the tokens repeat;
      * a token costs four entries of a dict, whatever the length of the text.
    """

    tokens: list[int] = field(default_factory=list)
    _places: dict[tuple[int, ...], int] = field(default_factory=dict)  # of a run: the position after it
    _found: int = 0  # the position after the last place of the text's end before; 0: none

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the text."""
        text, places = self.tokens, self._places
        for token in tokens:
            text.append(token)
            stop, self._found = len(text), 0
            for size in range(min(LONGEST, stop), SHORTEST - 1, -1):
                run = tuple(text[-size:])
                if not self._found:
                    self._found = places.get(run, 0)
                places[run] = stop

    def propose(self, most: int) -> Proposal:
        """Up to `most` tokens after the end of the text: all of them, or none."""
        if most < 1 or not self._found:
            return Proposal()
        text, place = self.tokens, self._found
        found = text[place : place + most]
        distance = len(text) - place
        while len(found) < most:
            found.append(found[len(found) - distance])
        return Proposal(tuple(found), self._matched(place))

    def _matched(self, place: int) -> int:
        """The tokens before `place` that agree with those at the end, FARTHEST at most."""
        text, stop = self.tokens, len(self.tokens)
        matched, most = 0, min(FARTHEST, place)
        while matched < most and text[place - 1 - matched] == text[stop - 1 - matched]:
            matched += 1
        return matched
