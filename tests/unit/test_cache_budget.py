"""Promised cache tokens: never more than there are, never more than a peer's share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from node.serving.cache import CacheBudget
from tensor_codec.errors import CacheFull, LocalProtocolError
from tensor_codec.limits import Limits


def test_a_session_that_asks_for_more_than_a_peer_may_ever_have_is_told_not_to_come_back():
    budget = CacheBudget(1000, 0.25, least_share_tokens=10)
    with pytest.raises(CacheFull, match="251 tokens, 250 are allowed") as refusal:
        budget.admit(b"a", "p", 251)
    assert refusal.value.retry_after_seconds is None


def test_a_peer_that_holds_its_share_is_told_when_to_come_back_and_others_are_let_in():
    budget = CacheBudget(1000, 0.25, least_share_tokens=10)
    budget.admit(b"a", "greedy", 200)
    with pytest.raises(CacheFull, match="51 tokens more than the 200 that you hold") as refusal:
        budget.admit(b"b", "greedy", 51)
    assert refusal.value.retry_after_seconds is not None
    budget.admit(b"b", "greedy", 50)
    budget.admit(b"c", "other", 250)


def test_a_full_cache_says_when_to_come_back_and_has_room_after_a_release():
    budget = CacheBudget(100, 1.0)
    budget.admit(b"a", "one", 60)
    with pytest.raises(CacheFull, match="40 of 100 are free") as refusal:
        budget.admit(b"b", "two", 41)
    assert refusal.value.retry_after_seconds is not None
    budget.release(b"a")
    budget.admit(b"b", "two", 100)


def test_one_session_of_the_largest_allowed_size_fits_into_a_small_share():
    limits = Limits()
    budget = CacheBudget(10_000, limits.cache_share_per_peer, limits.max_session_tokens)
    budget.admit(b"a", "p", limits.max_session_tokens)
    tiny = CacheBudget(100, limits.cache_share_per_peer, limits.max_session_tokens)
    assert tiny.peer_tokens == 100


def test_a_session_admitted_twice_or_released_twice_is_our_own_bug():
    budget = CacheBudget(100, 1.0)
    budget.admit(b"a", "p", 1)
    with pytest.raises(LocalProtocolError):
        budget.admit(b"a", "p", 1)
    budget.release(b"a")
    with pytest.raises(KeyError):
        budget.release(b"a")


class Budget(RuleBasedStateMachine):
    """Peers come and go; what they hold is kept a second time, in a plain dict."""

    sessions = Bundle("sessions")

    @initialize(tokens=st.integers(0, 500), share=st.floats(0, 1), least=st.integers(0, 600))
    def begin(self, tokens: int, share: float, least: int) -> None:
        self.budget = CacheBudget(tokens, share, least)
        self.held: dict[bytes, tuple[str, int]] = {}
        self.count = 0

    @rule(target=sessions, peer=st.sampled_from("abc"), tokens=st.integers(1, 300))
    def admit(self, peer: str, tokens: int) -> bytes | None:
        self.count += 1
        session = self.count.to_bytes(16, "big")
        mine = sum(size for who, size in self.held.values() if who == peer)
        fits = mine + tokens <= self.budget.peer_tokens and tokens <= self.budget.free_tokens
        try:
            self.budget.admit(session, peer, tokens)
        except CacheFull:
            assert not fits, "refused although there was room"
            return None
        assert fits
        self.held[session] = (peer, tokens)
        return session

    @rule(session=consumes(sessions))
    def release(self, session: bytes | None) -> None:
        if session is not None:
            self.budget.release(session)
            del self.held[session]

    @invariant()
    def never_over_promised(self) -> None:
        if hasattr(self, "held"):
            promised = sum(tokens for _, tokens in self.held.values())
            assert 0 <= self.budget.free_tokens == self.budget.tokens - promised

    @invariant()
    def no_peer_has_more_than_its_share(self) -> None:
        for peer in "abc" if hasattr(self, "held") else "":
            mine = sum(tokens for who, tokens in self.held.values() if who == peer)
            assert mine <= self.budget.peer_tokens <= self.budget.tokens

    def teardown(self) -> None:
        for session in list(getattr(self, "held", ())):
            self.budget.release(session)
        if hasattr(self, "held"):
            assert self.budget == CacheBudget(
                self.budget.tokens, self.budget.share_per_peer, self.budget.least_share_tokens
            )


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
