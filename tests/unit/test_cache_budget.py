"""Pages of the cache: never more than there are, never more than a peer's share, never a deadlock."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from node.serving.cache_budget import CacheBudget
from tensor_codec.errors import CacheFull, LocalProtocolError
from tensor_codec.limits import Limits


def test_a_session_that_may_need_more_than_one_may_ever_have_is_told_not_to_come_back():
    budget = CacheBudget(960, 0.25, least_share_tokens=16, max_session_tokens=240)
    budget.admit(b"a", "p", 1, 240)
    with pytest.raises(
        CacheFull, match="1 x 241 tokens takes 256 in pages of 16, 240 are allowed"
    ) as refusal:
        budget.admit(b"b", "p", 1, 241)
    assert refusal.value.retry_after_seconds is None
    with pytest.raises(CacheFull, match="16 x 1 tokens takes 256") as refusal:
        budget.admit(b"b", "p", 16, 1)  # each row has a page of its own
    assert refusal.value.retry_after_seconds is None


def test_a_peer_at_its_share_is_told_when_to_come_back_and_others_go_on():
    budget = CacheBudget(960, 0.25, least_share_tokens=16)
    budget.admit(b"a", "greedy", 1, 160)
    budget.admit(b"b", "greedy", 1, 160)
    budget.grow(b"a", 160)
    budget.grow(b"b", 80)
    with pytest.raises(CacheFull, match="16 tokens more than the 240 that you hold, 0 are to be") as refusal:
        budget.grow(b"b", 81)
    assert refusal.value.retry_after_seconds is not None
    with pytest.raises(CacheFull, match="240 are allowed a peer"):
        budget.admit(b"c", "greedy", 1, 16)
    budget.admit(b"c", "other", 1, 240)
    budget.grow(b"c", 240)
    assert (budget.held_tokens("greedy"), budget.held_tokens("other")) == (240, 240)


def test_memory_follows_what_is_used_and_not_what_was_asked_for():
    budget = CacheBudget(16_384)
    for number in range(200):
        session = number.to_bytes(16, "big")
        budget.admit(session, f"peer {number}", 1, 2048)
        budget.grow(session, 40)
    assert budget.free_tokens == 16_384 - 200 * 48


def test_one_peer_with_many_sessions_leaves_room_for_its_oldest_and_is_then_refused():
    budget = CacheBudget(16_384)
    sessions = [number.to_bytes(16, "big") for number in range(200)]
    room = (8192 - 2048 + 48) // 48  # 2,048 are the oldest one's, 48 each of the others'
    for session in sessions[:room]:
        budget.admit(session, "p", 1, 2048)
        budget.grow(session, 40)
    with pytest.raises(CacheFull, match="8192 are allowed a peer"):
        budget.admit(sessions[room], "p", 1, 2048)
    budget.grow(sessions[0], 2048)


def test_a_full_cache_says_when_to_come_back_and_has_room_after_a_cut_or_an_end():
    budget = CacheBudget(160, 1.0)
    budget.admit(b"a", "one", 2, 64)
    budget.grow(b"a", 64)
    budget.admit(b"b", "two", 1, 160)
    budget.grow(b"b", 32)
    with pytest.raises(CacheFull, match="16 tokens more, 0 of 160 are free") as refusal:
        budget.grow(b"b", 33)
    assert refusal.value.retry_after_seconds is not None
    budget.shrink(b"a", 48)
    with pytest.raises(CacheFull, match="32 of 160 are free and 0 to be had beside what older"):
        budget.grow(b"b", 33)
    budget.release(b"a")
    budget.grow(b"b", 160)


def test_room_that_is_there_already_is_not_taken_twice_and_a_cut_keeps_begun_pages():
    budget = CacheBudget(160, 1.0)
    budget.admit(b"a", "p", 2, 80)
    budget.grow(b"a", 17)
    assert budget.held_tokens("p") == 64
    budget.grow(b"a", 32)
    budget.grow(b"a", 1)
    assert budget.held_tokens("p") == 64
    budget.shrink(b"a", 17)
    assert budget.held_tokens("p") == 64
    budget.shrink(b"a", 16)
    assert budget.held_tokens("p") == 32
    budget.shrink(b"a", 48)  # never grows
    assert budget.held_tokens("p") == 32
    budget.shrink(b"a", 0)
    assert budget.free_tokens == 160


def test_the_next_oldest_can_go_on_to_its_end_as_soon_as_the_oldest_has_ended():
    # A reserve for the oldest alone would let `c` take what `b` needs once it is the oldest itself.
    budget = CacheBudget(160, 1.0)
    budget.admit(b"a", "one", 1, 32)
    budget.grow(b"a", 32)
    budget.admit(b"b", "two", 1, 144)
    budget.admit(b"c", "three", 1, 160)
    budget.grow(b"c", 16)
    with pytest.raises(CacheFull, match="112 of 160 are free and 0 to be had"):
        budget.grow(b"c", 17)
    budget.release(b"a")
    budget.grow(b"b", 144)


def test_a_share_is_never_small_where_the_cache_is():
    limits = Limits()
    assert CacheBudget(10_000, limits.cache_share_per_peer, limits.least_share_tokens).peer_tokens == 8192
    assert CacheBudget(100, limits.cache_share_per_peer, limits.least_share_tokens).peer_tokens == 96
    assert CacheBudget(65_536, limits.cache_share_per_peer, limits.least_share_tokens).peer_tokens == 16_384


def test_one_session_may_have_the_whole_cache_and_costs_others_nothing_before_it_has_grown():
    budget = CacheBudget(65_536)
    budget.admit(b"long", "p", 1, 65_536)
    budget.grow(b"long", 16)
    for number in range(3):  # each peer's share, as if the long one were not there
        budget.admit(bytes([number]), f"peer {number}", 1, 16_384)
        budget.grow(bytes([number]), 16_384)
    budget.grow(b"long", 16_384)
    with pytest.raises(CacheFull, match="0 to be had beside what other sessions may need") as refusal:
        budget.grow(b"long", 16_385)
    assert refusal.value.retry_after_seconds is not None
    for number in range(3):
        budget.release(bytes([number]))
    budget.grow(b"long", 65_536)
    with pytest.raises(CacheFull, match="longer sessions hold 65536") as refusal:
        budget.admit(b"new", "q", 1, 16)
    assert refusal.value.retry_after_seconds is not None


def test_a_long_session_cannot_take_what_a_younger_one_was_promised():
    budget = CacheBudget(65_536)
    budget.admit(b"long", "p", 1, 65_536)
    budget.admit(b"short", "q", 1, 16_384)
    budget.grow(b"long", 65_536 - 16_384)
    with pytest.raises(CacheFull, match="16384 of 65536 are free and 0 to be had"):
        budget.grow(b"long", 65_536 - 16_384 + 1)
    budget.grow(b"short", 16_384)


def test_long_sessions_of_one_peer_share_what_one_may_have():
    budget = CacheBudget(65_536, max_session_tokens=32_768)
    budget.admit(b"a", "p", 1, 32_768)
    with pytest.raises(CacheFull, match="32768 are allowed the long sessions of a peer here"):
        budget.admit(b"b", "p", 1, 32_768)
    budget.admit(b"b", "p", 1, 16_384)
    budget.grow(b"b", 16_384)
    budget.admit(b"c", "q", 1, 32_768)
    budget.grow(b"a", 32_768)


def test_rows_are_counted_before_they_hold_a_page():
    budget = CacheBudget(1600)
    budget.admit(b"a", "p", 60, 16)
    with pytest.raises(CacheFull, match="41 rows beside 60, 100 are allowed here") as refusal:
        budget.admit(b"b", "q", 41, 16)
    assert refusal.value.retry_after_seconds is not None
    budget.admit(b"b", "q", 40, 16)


def test_what_never_may_happen_is_our_own_bug():
    budget = CacheBudget(160, 1.0)
    budget.admit(b"a", "p", 1, 20)
    with pytest.raises(LocalProtocolError):
        budget.admit(b"a", "p", 1, 20)
    with pytest.raises(LocalProtocolError, match="21 positions in a session opened for 20"):
        budget.grow(b"a", 21)
    budget.release(b"a")
    with pytest.raises(KeyError):
        budget.release(b"a")


def refusal_of(act: Callable[[], None]) -> CacheFull | None:
    try:
        act()
    except CacheFull as refusal:
        return refusal
    return None


class Budget(RuleBasedStateMachine):
    """Sessions come, grow, are cut and go; what they hold is kept a second time, in a plain dict."""

    @initialize(
        tokens=st.integers(0, 500),
        share=st.floats(0, 1),
        least=st.integers(0, 600),
        page=st.sampled_from([1, 4, 16]),
        longest=st.none() | st.integers(1, 600),
    )
    def begin(self, tokens: int, share: float, least: int, page: int, longest: int | None) -> None:
        self.budget = CacheBudget(tokens, share, least, page, longest)
        self.held: dict[bytes, tuple[str, int, int, int]] = {}  # peer, rows, max_length, pages of a row
        self.count = 0

    @rule(peer=st.sampled_from("abc"), rows=st.integers(1, 3), max_length=st.integers(1, 200))
    def admit(self, peer: str, rows: int, max_length: int) -> None:
        self.count += 1
        session = self.count.to_bytes(16, "big")
        before = deepcopy(self.budget)
        refusal = refusal_of(lambda: self.budget.admit(session, peer, rows, max_length))
        if refusal is not None:
            assert self.budget == before
            for_ever = rows * self.pages(max_length) * self.budget.page_tokens > self.budget.session_tokens
            assert (refusal.retry_after_seconds is None) == for_ever
        else:
            self.held[session] = (peer, rows, max_length, 0)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(list(self.held)))
        peer, rows, max_length, pages = self.held[session]
        length = data.draw(st.integers(0, max_length))
        before = deepcopy(self.budget)
        refusal = refusal_of(lambda: self.budget.grow(session, length))
        if refusal is not None:
            assert self.budget == before
            assert refusal.retry_after_seconds is not None
            assert session != self.in_order()[0], "the first was refused"
        else:
            self.held[session] = (peer, rows, max_length, max(pages, self.pages(length)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(list(self.held)))
        peer, rows, max_length, pages = self.held[session]
        length = data.draw(st.integers(0, max_length))
        self.budget.shrink(session, length)
        self.held[session] = (peer, rows, max_length, min(pages, self.pages(length)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(list(self.held)))
        self.budget.release(session)
        del self.held[session]

    def in_order(self) -> list[bytes]:
        return sorted(self.held, key=self.is_long)

    def is_long(self, session: bytes) -> bool:
        _, rows, max_length, _ = self.held[session]
        return rows * self.pages(max_length) * self.budget.page_tokens > self.budget.peer_tokens

    def pages(self, length: int) -> int:
        return -(-length // self.budget.page_tokens)

    def tokens_of(self, peer: str, *long: bool) -> int:
        page = self.budget.page_tokens
        mine = [session for session, held in self.held.items() if held[0] == peer]
        return sum(page * self.held[one][1] * self.held[one][3] for one in mine if self.is_long(one) in long)

    @invariant()
    def no_more_is_held_than_there_is_and_no_more_by_a_peer_than_its_share(self) -> None:
        held = {peer: self.tokens_of(peer, False, True) for peer in "abc"}
        assert held == {peer: self.budget.held_tokens(peer) for peer in "abc"}
        for peer in "abc":
            assert self.tokens_of(peer, False) <= self.budget.peer_tokens <= self.budget.tokens
            assert self.tokens_of(peer, True) <= self.budget.session_tokens <= self.budget.tokens
        whole = self.budget.tokens - self.budget.tokens % self.budget.page_tokens
        assert 0 <= self.budget.free_tokens == whole - sum(held.values())

    @invariant()
    def every_session_can_go_on_to_its_end_when_those_before_it_have_ended(self) -> None:
        budget = deepcopy(self.budget)
        for session in self.in_order():
            budget.grow(session, self.held[session][2])
            budget.release(session)
        page = budget.page_tokens
        assert budget.free_tokens == budget.tokens // page * page

    @invariant()
    def what_promising_whole_lengths_would_let_in_is_let_in(self) -> None:
        budget = deepcopy(self.budget)
        page = budget.page_tokens
        promised = sum(page * rows * self.pages(length) for _, rows, length, _ in self.held.values())
        room = min(budget.tokens - promised, budget.session_tokens) // page * page
        if room > 0:
            budget.admit(b"new", "nobody yet", 1, room)
            budget.grow(b"new", room)

    def teardown(self) -> None:
        for session in self.held if hasattr(self, "held") else ():
            self.budget.release(session)
        if hasattr(self, "held"):
            assert self.budget == CacheBudget(
                self.budget.tokens,
                self.budget.share_per_peer,
                self.budget.least_share_tokens,
                self.budget.page_tokens,
                self.budget.max_session_tokens,
            )


TestBudget = Budget.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
