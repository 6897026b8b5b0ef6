"""The number of proposals, on simulated texts and swarms: seconds are the policy's own model with noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.session.core import FEW_TOKENS
from client.speculation.lookup import NgramIndex
from client.speculation.width import MAX_DRAFTS, StepSeconds, WidthPolicy
from node.serving.executor.batcher import BatchPolicy

VOCABULARY = 2000
FIXED = (0, 1, 2, 4, 8, 15)
RTTS = (0.0, 0.005, 0.02, 0.1)


def story(rng: random.Random, tokens: int) -> list[int]:
    """Few runs of a story occur twice."""
    text: list[int] = []
    for _ in range(tokens):
        if text and rng.random() < 0.5:
            text.append((text[-1] * 31 + rng.randrange(40) * 17) % VOCABULARY)
        else:
            text.append(min(int(rng.paretovariate(0.7)), VOCABULARY - 1))
    return text


def edit(rng: random.Random, tokens: int) -> tuple[list[int], int]:
    """Code, and the same code with changes; and the tokens of the first, the prompt."""
    before = story(rng, tokens)
    text, at = list(before), 0
    while len(text) < 2 * tokens:
        if rng.random() < 0.06:
            text.append(rng.randrange(VOCABULARY))
            at += rng.randrange(2)
        else:
            text.append(before[at % tokens])
            at += 1
    return text, tokens


@dataclass(frozen=True)
class Case:
    """A text, the tokens of its prompt, the round trip to three servers, and the seed of the noise."""

    text: list[int]
    prompt: int
    rtt: float
    seed: int
    each: float = 0.0009
    start: float = 0.0

    def seconds(self, width: Callable[[int, int], int], policy: WidthPolicy | None = None) -> float:
        """Of the whole text.  width: of a match's length and the tokens at hand."""
        rng, index = random.Random(self.seed), NgramIndex()
        index.extend(self.text[: self.prompt + 1])  # the first token comes with the prompt
        at, spent = self.prompt + 1, 0.0
        while at < len(self.text):
            proposal = index.propose(min(MAX_DRAFTS, len(self.text) - at - 1))
            drafts = width(proposal.matched, len(proposal.tokens))
            least = 0.012 + 2 * self.rtt + drafts * self.each + self.start * (drafts > 0)
            took = least * (1 + abs(rng.gauss(0, 0.05)))
            right = 0
            while right < drafts and proposal.tokens[right] == self.text[at + right]:
                right += 1
            spent += took
            if policy is not None:
                policy.stepped(drafts, took)
                policy.judged(proposal.matched, drafts, right)
            index.extend(self.text[at : at + right + 1])
            at += right + 1
        return spent

    def by_policy(self, policy: WidthPolicy) -> float:
        """See `seconds`."""
        return self.seconds(policy.width, policy)

    def by_fixed(self, drafts: int) -> float:
        """See `seconds`."""
        return self.seconds(lambda _, most: min(most, drafts))


def cases(kind: str, rtt: float, tokens: int, **others: float) -> list[Case]:
    found = []
    for seed in range(6):
        rng = random.Random(seed)
        text, prompt = (story(rng, tokens + 200), 200) if kind == "story" else edit(rng, tokens)
        if kind == "both":  # an edit that becomes a story
            text = text[: prompt + tokens // 2] + story(rng, tokens // 2)
        found.append(Case(text, prompt, rtt, seed, **others))
    return found


@pytest.mark.parametrize("rtt", RTTS)
@pytest.mark.parametrize("kind", ["story", "edit", "both"])
@pytest.mark.parametrize("tokens", [64, 300])
def test_a_guarded_generation_is_never_more_than_two_percent_slower(kind, rtt, tokens):
    for case in cases(kind, rtt, tokens):
        assert case.by_policy(WidthPolicy()) <= 1.02 * case.by_fixed(0)


@pytest.mark.parametrize(
    ("each", "start"), [(0.004, 0.0), (0.012, 0.0), (0.0009, 0.016), (0.002, 0.022), (0.004, 0.016)]
)
def test_nor_where_a_proposal_costs_a_third_of_a_step_or_a_whole_one(each, start):
    for kind in ("story", "edit"):
        for case in cases(kind, 0.0, 200, each=each, start=start):
            assert case.by_policy(WidthPolicy()) <= 1.02 * case.by_fixed(0)


@pytest.mark.parametrize("rtt", RTTS)
@pytest.mark.parametrize("kind", ["story", "edit", "both"])
@pytest.mark.parametrize("guarded", [True, False])
def test_it_is_about_as_fast_as_with_the_best_fixed_number(kind, rtt, guarded):
    slower = [
        case.by_policy(WidthPolicy(guarded)) / min(map(case.by_fixed, FIXED))
        for case in cases(kind, rtt, 300)
    ]
    assert sum(slower) / len(slower) <= 1.1


def test_an_edit_is_faster_where_the_first_proposal_costs_more_than_a_step():
    for case in cases("edit", 0.0, 300, start=0.016):
        assert case.by_fixed(0) / case.by_policy(WidthPolicy(guarded=False)) > 1.3
        assert case.by_fixed(0) / case.by_policy(WidthPolicy()) > 1.0


def test_an_edit_is_several_times_as_fast_over_a_long_way():
    for case in cases("edit", 0.1, 300):
        assert case.by_fixed(0) / case.by_policy(WidthPolicy()) > 2.5


def test_proposals_that_are_always_wrong_end_and_are_tried_again_later():
    policy, widths = WidthPolicy(), []
    for _ in range(3000):
        widths.append(policy.width(2, MAX_DRAFTS))
        policy.stepped(widths[-1], 0.012 + 0.003 * widths[-1])
        policy.judged(2, widths[-1], 0)
    assert sum(widths[100:]) * 0.003 <= 0.011 * 2900 * 0.012  # in the end the account alone allows them
    assert any(widths[-1000:])


def test_the_more_generations_wait_for_each_other_the_fewer_proposals():
    policy = WidthPolicy(guarded=False)
    for drafts in [0, 8] * 20:
        policy.stepped(drafts, 0.016 + 0.001 * drafts)
        policy.judged(5, drafts, drafts // 2)
    widths = [policy.width(5, MAX_DRAFTS, sharing=sharing) for sharing in (1, 2, 4, 8, 16)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 4
    assert widths[-1] <= 1


def test_a_model_that_takes_longer_than_the_round_trip_guesses_nothing():
    policy = WidthPolicy(guarded=False)
    policy.stepped(0, 0.010)
    assert policy.width(0, MAX_DRAFTS, drafting=0.0002) > 1
    assert policy.width(0, MAX_DRAFTS, drafting=0.020) == 0


def test_a_step_with_the_most_proposals_joins_decode_batches_on_the_stream_of_single_tokens():
    assert MAX_DRAFTS + 1 == BatchPolicy().decode_tokens == FEW_TOKENS


def test_nothing_is_proposed_before_a_step_was_seen():
    assert WidthPolicy().width(24, MAX_DRAFTS) == 0


@given(st.lists(st.tuples(st.integers(0, MAX_DRAFTS), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_seconds_of_a_step_are_positive_and_within_reason_whatever_comes(steps):
    learned = StepSeconds()
    for drafts, seconds in steps:
        learned.learn(drafts, seconds)
    assert 0 < learned.first < 40
    found = [learned.of(drafts) for drafts in range(MAX_DRAFTS + 1)]
    assert all(learned.first <= each < math.inf for each in found)


def test_the_cost_of_a_proposal_is_learned_from_steps_of_several_lengths():
    rng, learned = random.Random(0), StepSeconds()
    for _ in range(100):
        drafts = rng.choice((0, rng.randrange(MAX_DRAFTS)))
        learned.learn(drafts, 0.2 + 0.004 * drafts + rng.gauss(0, 0.002))
    for drafts in (0, 1, 4, 15):
        assert learned.of(drafts) == pytest.approx(0.2 + 0.004 * drafts, rel=0.05)


def test_several_tokens_that_cost_more_than_one_but_hardly_more_than_two_are_learned_so():
    learned = StepSeconds()
    for drafts in [0, 0, 0, 1] * 20:  # a float32 span whose kernel for several rows is slow
        learned.learn(drafts, 0.016 if not drafts else 0.035 + 0.002 * drafts)
    assert learned.of(1) == pytest.approx(0.037, rel=0.05)
    assert learned.of(8) < 0.055


def test_a_step_that_was_disturbed_counts_little():
    learned = StepSeconds()
    learned.learn(0, 0.01)
    learned.learn(0, 5.0)
    assert learned.first < 0.02
