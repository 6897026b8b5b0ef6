"""How many tokens to propose: by measured acceptance, the seconds of a step, and an account of losses.  Pure.

A step of 1 + k tokens gives one token for certain and one for each proposal in a row that was right.  So

    tokens a second (k) = (1 + p1 + p1 p2 + ... + p1 .. pk) / seconds (k)

with pj the share of right proposals after as long a match, and the seconds learned from the steps.
The seconds hold the round trip, the queues at the servers and their computing: far servers make a proposal
cheap, busy servers make it dear.  The k with the most tokens a second is taken.

A wrong model must not cost much, so a guarded policy has an account in seconds.  Every step pays LOSS_SHARE
of its time in and every proposal its cost out; an accepted proposal pays a step in.  No step may cost more
than the account holds.  Shares of acceptance fade to their first guesses, so a proposal is tried again later.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field

MAX_DRAFTS = 15  # a step of 16 tokens joins the servers' decode batches, a longer one does not
LOSS_SHARE = 0.01  # of the time, that proposals in vain may take
FIRST_LOSS = 0.25  # steps, that they may take besides
MOST_SAVED = 8.0  # steps, that the account may hold
# Matches by their length in tokens, each with a first guess of the share of right proposals; 0: of a model.
_LENGTHS = (0, 2, 3, 4, 5, 7, 10, 16)
_GUESSES = (0.6, 0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 0.9)
_GUESS_WEIGHT = 2.0  # proposals
_MEMORY = 0.97  # of a share, for each proposal
_FADING = 0.995  # of a share, for each token of the text
_STEP_MEMORY = 0.95  # of steps with proposals, for each of them
_PLAIN_MEMORY = 0.998  # of the same, for each step without
_FIRST_GAIN = 0.15  # of the difference of a step without proposals
_DRIFT_GAIN = 0.05  # of that of a step with them: all steps get slower together
_EACH_GUESS = 0.06  # of a step of one token, that each further token costs: int8 weights on CPUs
_EACH_WEIGHT = 4.0  # of that guess, in squared tokens
_START_WEIGHT = 0.25  # of the guess that several tokens begin to cost as one does, in steps
_LEAST_EACH = 0.01  # of a step of one token
_CLOCK_SECONDS = 1e-6  # no step takes less
_MOST_LATE = 3.0  # expected times: a step that takes longer was disturbed


@dataclass(slots=True)
class StepSeconds:
    """Seconds of a step by its proposals, learned from the steps.

    A step without proposals takes `first`.  One with k of them takes as many times as long as the line
    start + k each says: where weights are read by another kernel for several rows, start is above 1.
    """

    first: float = 0.0
    # Of the times of `first`, and the proposals, of the last steps with proposals: fading sums.
    _weight: float = 0.0
    _drafts: float = 0.0
    _times: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    def learn(self, drafts: int, seconds: float) -> None:
        """A step with so many proposals took so long."""
        seconds = max(seconds, _CLOCK_SECONDS)
        if not self.first:
            self.first = seconds / self._expected(drafts)
            return
        times = min(seconds / self.first, _MOST_LATE * self._expected(drafts))
        if not drafts:
            self.first += _FIRST_GAIN * self.first * (times - 1)
            self._fade(_PLAIN_MEMORY)
            return
        self.first *= (times / self._expected(drafts)) ** _DRIFT_GAIN
        self._fade(_STEP_MEMORY)
        self._weight += 1
        self._drafts += drafts
        self._times += times
        self._squares += drafts * drafts
        self._products += drafts * times

    @property
    def is_known(self) -> bool:
        """Whether a step was seen."""
        return self.first > 0

    def of(self, drafts: int) -> float:
        """Of a step with so many proposals."""
        return self.first * self._expected(drafts)

    def _expected(self, drafts: int) -> float:
        """Times of `first`: by least squares, with a guess of either number that weighs as a few steps."""
        if not drafts:
            return 1.0
        n, k, kk = self._weight + _START_WEIGHT, self._drafts, self._squares + _EACH_WEIGHT
        t, kt = self._times + _START_WEIGHT, self._products + _EACH_WEIGHT * _EACH_GUESS
        area = n * kk - k * k
        start, each = (kk * t - k * kt) / area, (n * kt - k * t) / area
        return max(start + each * drafts, 1 + _LEAST_EACH * drafts)

    def _fade(self, kept: float) -> None:
        self._weight *= kept
        self._drafts *= kept
        self._times *= kept
        self._squares *= kept
        self._products *= kept


@dataclass(slots=True)
class Share:
    """The share of right proposals of one kind.  right, tried: fading counts.  at: tokens of the text."""

    guess: float
    right: float = 0.0
    tried: float = 0.0
    at: int = 0

    def learn(self, at: int, *, is_right: bool) -> None:
        """One proposal of this kind was judged."""
        kept = _MEMORY * _FADING ** (at - self.at)
        self.right, self.tried, self.at = kept * self.right + is_right, kept * self.tried + 1, at

    def now(self, at: int) -> float:
        """The expected share."""
        kept = _FADING ** (at - self.at)
        return (kept * self.right + _GUESS_WEIGHT * self.guess) / (kept * self.tried + _GUESS_WEIGHT)


@dataclass(slots=True)
class WidthPolicy:
    """Says how many tokens to propose in each step of one generation.

    guarded: it keeps an account, so that proposals in vain take little of the time.
    most: of proposals in one step.
    Promises, checked by tests/unit/test_width.py on simulated texts and swarms:
      * guarded, a generation is never more than 2 % slower than without proposals;
      * it is about as fast as with the best fixed number of proposals.
    """

    guarded: bool = True
    most: int = MAX_DRAFTS
    seconds: StepSeconds = field(default_factory=StepSeconds)
    _shares: list[Share] = field(default_factory=lambda: [Share(guess) for guess in _GUESSES])
    _account: float = 0.0  # seconds
    _tokens: int = 0  # of the text so far

    def width(self, matched: int, most: int, *, sharing: int = 1, drafting: float = 0.0) -> int:
        """The number of proposals for the next step, 0 to `most`.

        matched: see `Proposal`.  sharing: generations that wait for each other's steps, this one included: a
        proposal costs each of them time.  drafting: seconds to make one proposal.
        """
        most = min(most, self.most)
        if most < 1 or not self.seconds.is_known:
            return 0
        first = self.seconds.first
        affordable = self._account + FIRST_LOSS * first if self.guarded else math.inf
        best, best_rate, tokens, reached = 0, 1 / first, 1.0, 1.0
        for drafts in range(1, most + 1):
            cost = self._cost(drafts, sharing, drafting)
            if cost > affordable:
                break
            reached *= self._share(matched, drafts - 1).now(self._tokens)
            tokens += reached
            if (rate := tokens / (first + cost)) > best_rate:
                best, best_rate = drafts, rate
        return best

    def stepped(self, drafts: int, seconds: float, *, sharing: int = 1) -> None:
        """A step with so many proposals was answered after so long."""
        self.seconds.learn(drafts, seconds)
        first = self.seconds.first
        late = min(seconds, _MOST_LATE * self.seconds.of(drafts)) - first
        self._pay(LOSS_SHARE * first - (sharing * late if drafts else 0.0))

    def judged(self, matched: int, drafts: int, accepted: int, *, drafting: float = 0.0) -> None:
        """Of so many proposals the first `accepted` were right, and the next one, if any, was wrong."""
        self._tokens += accepted + 1
        if not drafts:
            return
        for place in range(min(accepted + 1, drafts)):
            self._share(matched, place).learn(self._tokens, is_right=place < accepted)
        if self.seconds.is_known:
            self._pay(accepted * self.seconds.first - drafts * drafting)

    def _cost(self, drafts: int, sharing: int, drafting: float) -> float:
        """Seconds that so many proposals cost, besides those of a step without."""
        return sharing * (self.seconds.of(drafts) - self.seconds.first) + drafts * drafting

    def _pay(self, seconds: float) -> None:
        self._account = min(self._account + seconds, MOST_SAVED * self.seconds.first)

    def _share(self, matched: int, place: int) -> Share:
        """Of the proposal at `place`, where those before it were right: the match is longer by them."""
        return self._shares[0 if not matched else bisect_right(_LENGTHS, matched + place) - 1]
