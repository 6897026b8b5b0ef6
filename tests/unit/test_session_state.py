"""One session at one hop: a step is applied once, in order, whatever the network does to it."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client.session.repair.replay_plan import HopProgress, Sent, plan
from client.session.steps import StepSource
from node.serving.sessions.state import Compute, Repeat, ServerSession, State
from tensor_codec.errors import LocalProtocolError, RemoteProtocolError
from tensor_codec.messages.contract import StepRange
from tensor_codec.messages.session import Result

MOST = 12


def applied(session: ServerSession, step: int, position: int, tokens: int) -> Compute:
    """Receive and compute a step that the session is expected to take."""
    decision = session.receive(step, StepRange(position, tokens))
    assert isinstance(decision, Compute)
    session.computed(decision)
    return decision


def test_steps_that_follow_each_other_fill_the_cache_to_its_last_position():
    session = ServerSession(MOST)
    for step, position in enumerate(range(0, MOST, 3)):
        assert applied(session, step, position, 3).cut is None
        assert session.length == position + 3
    assert session.length == MOST


def test_a_step_repeated_is_answered_from_memory_and_not_computed():
    session = ServerSession(MOST)
    applied(session, 7, 0, 4)
    for _ in range(3):
        assert session.receive(7, StepRange(0, 4)) == Repeat(7)
    assert session.length == 4
    applied(session, 8, 4, 1)


def test_a_lower_position_cuts_the_cache_there_first():
    session = ServerSession(MOST)
    applied(session, 0, 0, 8)
    assert applied(session, 1, 5, 2).cut == 5
    assert session.length == 7
    assert applied(session, 2, 0, 3).cut == 0
    assert session.length == 3


def test_a_step_number_may_skip_some_but_never_go_back():
    session = ServerSession(MOST)
    applied(session, 0, 0, 1)
    applied(session, 10, 1, 1)
    with pytest.raises(RemoteProtocolError, match="step 9"):
        session.receive(9, StepRange(2, 1))


def test_a_step_that_a_resume_forgot_is_computed_when_it_comes_again_under_its_number():
    session = ServerSession(MOST)
    applied(session, 0, 0, 4)
    applied(session, 1, 4, 3)
    session.resume(4)
    assert session.length == 4
    assert applied(session, 1, 4, 3) == Compute(1, StepRange(4, 3), None)
    assert session.length == 7


def test_a_step_that_a_resume_kept_is_still_answered_from_memory():
    session = ServerSession(MOST)
    applied(session, 0, 0, 4)
    session.resume(4)
    assert session.receive(0, StepRange(0, 4)) == Repeat(0)


def test_a_resume_forgets_what_comes_after_it_and_cannot_add():
    session = ServerSession(MOST)
    applied(session, 0, 0, 8)
    session.resume(0)
    assert session.length == 0
    with pytest.raises(RemoteProtocolError, match="go on from 1, the cache holds 0"):
        session.resume(1)
    with pytest.raises(RemoteProtocolError):
        session.receive(1, StepRange(0, 1))


def test_a_model_that_cannot_cut_resumes_only_where_it_is_or_from_the_start():
    session = ServerSession(MOST, can_cut=False)
    applied(session, 0, 0, 8)
    session.resume(8)
    session.resume(0)
    applied(session, 1, 0, 8)
    with pytest.raises(RemoteProtocolError, match="back to position 5, which this model cannot"):
        session.resume(5)


@pytest.mark.parametrize(("position", "tokens"), [(0, 4), (3, 2), (5, 1), (4, 9), (4, 0)])
def test_a_replay_that_does_not_continue_the_cache_ends_the_session(position, tokens):
    session = ServerSession(MOST)
    applied(session, 0, 0, 4)
    with pytest.raises(RemoteProtocolError, match="does not continue a cache of 4"):
        session.replay(StepRange(position, tokens))
    assert session.state is State.CLOSED


def test_a_replay_fills_the_cache_and_takes_no_step_number():
    session = ServerSession(MOST)
    for position in range(0, MOST, 4):
        part = session.replay(StepRange(position, 4))
        assert part == Compute(None, StepRange(position, 4), None)
        session.computed(part)
    assert session.length == MOST
    assert session.last is None


def test_a_step_that_was_dropped_after_its_cut_leaves_the_cache_cut_and_may_come_again():
    session = ServerSession(MOST)
    applied(session, 0, 0, 8)
    decision = session.receive(1, StepRange(5, 2))
    assert isinstance(decision, Compute)
    session.dropped(decision)
    assert session.length == 5
    assert applied(session, 1, 5, 2) == Compute(1, StepRange(5, 2), None)
    assert session.length == 7


def test_a_step_that_was_dropped_without_a_cut_leaves_the_cache_as_it_was():
    session = ServerSession(MOST)
    applied(session, 0, 0, 8)
    decision = session.receive(1, StepRange(8, 2))
    assert isinstance(decision, Compute)
    session.dropped(decision)
    assert session.length == 8
    assert session.receive(0, StepRange(0, 8)) == Repeat(0)


# (step, position, tokens) that must not come after step 3 has put positions 0:4 into a cache of 12.
WRONG = {
    "a hole before it": (4, 5, 1),
    "a hole of many": (4, 11, 1),
    "one position too many": (4, 4, 9),
    "far too many positions": (4, 0, 13),
    "a position at the end": (4, 12, 1),
    "no positions": (4, 4, 0),
    "fewer than no positions": (4, 4, -1),
    "an earlier step": (2, 4, 1),
    "an earlier step that was never seen": (0, 4, 1),
    "the same step at another position": (3, 1, 4),
    "the same step with other positions": (3, 0, 3),
    "the same step with more positions": (3, 0, 5),
}


@pytest.mark.parametrize("why", WRONG)
def test_a_step_that_must_not_come_ends_the_session(why):
    step, position, tokens = WRONG[why]
    session = ServerSession(MOST)
    applied(session, 3, 0, 4)
    with pytest.raises(RemoteProtocolError):
        session.receive(step, StepRange(position, tokens))
    assert session.state is State.CLOSED
    assert session.length == 4


def test_the_same_step_that_wants_another_reply_back_is_not_a_retry():
    session = ServerSession(MOST)
    applied(session, 3, 0, 4)  # wants all positions back
    with pytest.raises(RemoteProtocolError):
        session.receive(3, StepRange(0, 4, "last"))


@pytest.mark.parametrize("why", WRONG)
def test_after_an_error_every_later_call_raises(why):
    step, position, tokens = WRONG[why]
    session = ServerSession(MOST)
    applied(session, 3, 0, 4)
    with pytest.raises(RemoteProtocolError):
        session.receive(step, StepRange(position, tokens))
    for later in [(3, 0, 4), (4, 4, 1), (5, 0, 1), (99, 4, 8)]:
        with pytest.raises(RemoteProtocolError, match="closed"):
            session.receive(later[0], StepRange(*later[1:]))
    assert session.length == 4


def test_a_closed_session_takes_nothing():
    session = ServerSession(MOST)
    session.close()
    with pytest.raises(RemoteProtocolError):
        session.receive(0, StepRange(0, 1))


def test_a_step_that_was_not_computed_leaves_no_trace():
    session = ServerSession(MOST)
    applied(session, 0, 0, 4)
    session.receive(1, StepRange(2, 5))
    assert (session.length, session.last) == (4, (0, StepRange(0, 4)))
    session.close()
    assert session.length == 4


def test_a_model_that_cannot_go_back_refuses_a_cut_and_takes_everything_else():
    session = ServerSession(MOST, can_cut=False)
    applied(session, 0, 0, 4)
    assert session.receive(0, StepRange(0, 4)) == Repeat(0)
    applied(session, 1, 4, 2)
    with pytest.raises(RemoteProtocolError, match="back to position 5"):
        session.receive(2, StepRange(5, 1))


def test_two_steps_at_a_time_or_an_answer_that_nobody_asked_for_is_our_own_bug():
    session = ServerSession(MOST)
    compute = session.receive(0, StepRange(0, 1))
    assert isinstance(compute, Compute)
    with pytest.raises(LocalProtocolError):
        session.receive(1, StepRange(1, 1))
    session.computed(compute)
    with pytest.raises(LocalProtocolError):
        session.computed(compute)


class SessionOverABadLink(RuleBasedStateMachine):
    """A client, a link that loses, doubles and reorders, and a hop with a cache that is a list.

    Each step carries tokens that no other step does, so the cache shows what was applied.
    """

    @initialize(most=st.integers(1, 16), can_cut=st.booleans(), seed=st.integers(0, 2**32))
    def begin(self, most: int, can_cut: bool, seed: int) -> None:
        self.most = most
        self.session = ServerSession(most, can_cut=can_cut)
        self.random = random.Random(seed)
        self.cache: list[str] = []
        self.link: deque[tuple[int, StepRange]] = deque()
        self.computed: list[int] = []
        self.in_hand: Compute | None = None
        self.broken = False
        self.next_step = 0
        self.planned = 0  # length that the caches have when all that was sent arrives in order
        self.sent: dict[int, StepRange] = {}

    @rule(tokens=st.integers(1, 4), back=st.integers(0, 3), skip=st.integers(0, 2))
    def client_sends(self, tokens: int, back: int, skip: int) -> None:
        position = max(0, self.planned - back)
        tokens = min(tokens, self.most - position)
        if tokens < 1:
            return
        self.next_step += 1 + skip
        self.sent[self.next_step] = StepRange(position, tokens)
        self.link.append((self.next_step, self.sent[self.next_step]))
        self.planned = position + tokens

    @rule(step=st.integers(0, 40), position=st.integers(0, 20), tokens=st.integers(-1, 20))
    def liar_sends(self, step: int, position: int, tokens: int) -> None:
        self.link.append((step, StepRange(position, tokens)))

    @precondition(lambda self: self.sent)
    @rule()
    def client_sends_again(self) -> None:
        step = max(self.sent)
        self.link.append((step, self.sent[step]))

    @precondition(lambda self: self.link)
    @rule(what=st.sampled_from(["lose", "double", "turn round"]))
    def link_is_bad(self, what: str) -> None:
        at = self.random.randrange(len(self.link))
        if what == "lose":
            del self.link[at]
        elif what == "double":
            self.link.insert(at, self.link[at])
        else:
            self.link[at], self.link[-1] = self.link[-1], self.link[at]

    @precondition(lambda self: self.link and self.in_hand is None)
    @rule()
    def hop_receives(self) -> None:
        step, what = self.link.popleft()
        before = (self.session.length, self.session.last)
        try:
            decision = self.session.receive(step, what)
        except RemoteProtocolError:
            assert (self.session.length, self.session.last) == before
            self.broken = True
            return
        assert not self.broken, "a session went on after an error"
        if isinstance(decision, Repeat):
            assert before[1] == (step, what), "an answer went out that belongs to another step"
        else:
            self.in_hand = decision

    @precondition(lambda self: self.in_hand is not None)
    @rule()
    def hop_computes(self) -> None:
        decision, self.in_hand = self.in_hand, None
        assert decision is not None
        what = decision.what
        assert (decision.cut is not None) == (what.position < len(self.cache))
        assert what.position <= len(self.cache), "a hole in the cache"
        del self.cache[what.position :]
        self.cache += [f"{decision.step}.{offset}" for offset in range(what.tokens)]
        self.computed.append(decision.step)
        self.session.computed(decision)

    @precondition(lambda self: self.in_hand is not None)
    @rule()
    def hop_is_cancelled(self) -> None:
        self.in_hand = None
        self.session.close()
        self.broken = True

    @invariant()
    def a_step_is_computed_at_most_once_and_in_order(self) -> None:
        if hasattr(self, "computed"):
            assert self.computed == sorted(set(self.computed))

    @invariant()
    def the_cache_is_as_long_as_the_session_says_and_no_longer_than_agreed(self) -> None:
        if hasattr(self, "cache"):
            assert len(self.cache) == self.session.length <= self.most

    @invariant()
    def what_is_in_the_cache_came_in_runs_of_whole_steps_or_of_their_beginnings(self) -> None:
        for before, after in zip(
            self.__dict__.get("cache", []), self.__dict__.get("cache", [])[1:], strict=False
        ):
            (one, offset), (other, begin) = (map(int, token.split(".")) for token in (before, after))
            assert (other, begin) == (one, offset + 1) or (other > one and begin == 0)

    @invariant()
    def after_an_error_every_call_raises(self) -> None:
        if getattr(self, "broken", False):
            with pytest.raises(RemoteProtocolError):
                self.session.receive(10**6, StepRange(self.session.length, 1))


TestSessionOverABadLink = SessionOverABadLink.TestCase
TestSessionOverABadLink.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


# Orders of rows


def ordering(position: int, tokens: int, *rows: int) -> StepRange:
    return StepRange(position, tokens, rows=rows)


def reordered(session: ServerSession, step: int, what: StepRange) -> Compute:
    """Receive a step whose order is applied, and go no further."""
    decision = session.receive(step, what)
    assert isinstance(decision, Compute)
    assert decision.reorder
    session.reordered(decision)
    return decision


def filled() -> ServerSession:
    """Six positions of two rows, from steps without an order."""
    session = ServerSession(MOST)
    applied(session, 0, 0, 4)
    applied(session, 1, 4, 2)
    return session


def test_the_order_of_a_step_is_applied_once_also_where_the_step_was_refused_and_comes_again():
    session, what = filled(), ordering(6, 1, 1, 1)
    session.dropped(reordered(session, 2, what))
    again = session.receive(2, what)
    assert again == Compute(2, what, None, reorder=False)
    session.computed(again)
    assert session.receive(2, what) == Repeat(2)
    assert reordered(session, 3, ordering(7, 1, 1, 0)).reorder


def test_a_step_that_was_refused_before_its_order_was_applied_has_it_applied_when_it_comes_again():
    session, what = filled(), ordering(5, 1, 1, 1)
    decision = session.receive(2, what)
    assert isinstance(decision, Compute)
    session.dropped(decision)
    assert reordered(session, 2, what).cut is None


def test_the_order_of_a_step_is_not_applied_again_when_a_resume_forgot_its_answer():
    session, what = filled(), ordering(6, 1, 1, 1)
    session.computed(reordered(session, 2, what))
    session.resume(6, step=2)
    again = session.receive(2, what)
    assert again == Compute(2, what, None, reorder=False)
    session.computed(again)
    assert session.orders == 3


def test_a_cache_that_begins_again_has_the_orders_before_the_step_that_comes_next():
    session, what = filled(), ordering(6, 1, 1, 1)
    session.computed(reordered(session, 2, what))
    session.resume(0, step=2)
    assert session.orders == 2
    session.computed(session.replay(StepRange(0, 6)))
    assert reordered(session, 2, what).reorder


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (2, ordering(6, 1, 0, 0)),  # another order
        (2, StepRange(6, 1)),  # no order
        (2, ordering(5, 1, 1, 1)),  # another position
        (1, StepRange(4, 2, "last")),  # a step before it
    ],
)
def test_after_an_order_was_applied_its_step_comes_with_it_or_not_at_all(step, what):
    session = filled()
    session.dropped(reordered(session, 2, ordering(6, 1, 1, 1)))
    with pytest.raises(RemoteProtocolError):
        session.receive(step, what)


def test_a_retry_with_another_order_is_no_retry():
    session, what = filled(), ordering(6, 1, 1, 1)
    session.computed(reordered(session, 2, what))
    with pytest.raises(RemoteProtocolError, match="step 2"):
        session.receive(2, ordering(6, 1, 0, 1))


@pytest.mark.parametrize(("length", "step"), [(6, 1), (5, 2), (1, 2)])
def test_a_resume_cannot_go_back_behind_an_order_but_to_the_beginning(length, step):
    session = filled()
    session.computed(reordered(session, 2, ordering(6, 1, 1, 1)))
    with pytest.raises(
        RemoteProtocolError, match="rows of the cache were reordered over 6 positions by step 2"
    ):
        session.resume(length, step)


def test_a_resume_cuts_below_an_order_that_stays():
    session = filled()
    session.computed(reordered(session, 2, ordering(6, 1, 1, 1)))
    session.resume(3, step=3)
    assert (session.length, session.orders) == (3, 3)


def test_an_order_that_nobody_asked_for_is_our_own_bug():
    session = filled()
    decision = session.receive(2, StepRange(6, 1))
    assert isinstance(decision, Compute)
    with pytest.raises(LocalProtocolError, match="without a request"):
        session.reordered(decision)


class Hop:
    """A hop whose cache is a list of names for each row, and the steps on their way to it."""

    def __init__(self) -> None:
        self.session = ServerSession(10**6)
        self.rows: list[list[str]] = [[], [], []]
        self.link: deque[Sent] = deque()


def rows_after(rows: list[list[str]], one: Sent) -> list[list[str]]:
    """What a step makes of rows: it cuts, orders, and adds names that no other step adds."""
    order = one.what.rows or range(len(rows))
    names = [f"{one.step}.{offset}" for offset in range(one.what.tokens)]
    kept = [rows[row][: one.what.position] for row in order]
    return [row + [f"{name} {index}" for name in names] for index, row in enumerate(kept)]


class RowsOverARoute:
    """A client whose steps order rows, and hops that refuse, die and are replaced, each step in its own time.

    The client decides with its own code (`StepSource`, `plan`).  Whatever happens, the rows of a hop that has
    computed a step are what all steps before it make of them, each order once.
    happened: how often each way of a step at a hop was gone.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.hops = [Hop() for _ in range(3)]
        self.steps = StepSource()
        self.taken: list[list[str]] = [[], [], []]  # by the answers that were collected
        self.answers: set[int] = set()
        self.broken = False
        self.happened: Counter[str] = Counter()

    def run(self, events: int) -> None:
        """Have so many things happen."""
        often = [self.hop_takes_a_step, self.answer_arrives, self.client_collects, self.client_steps]
        what = [*often * 10, *[self.route_changes] * 2, self.client_gives_up]
        for _ in range(events):
            self.route_changes() if self.broken else self.random.choice(what)()

    def wanted(self, before: int) -> list[list[str]]:
        """The rows after all steps below this number that were not given up."""
        rows = [row[: self.steps.length] for row in self.taken]
        for pending in self.steps.pending.values():
            if pending.step < before:
                rows = rows_after(rows, Sent(pending.step, pending.what))
        return rows

    def client_steps(self) -> None:
        if self.broken or len(self.steps.pending) >= 3:
            return
        length = len(self.wanted(10**6)[0])
        position = length if self.steps.pending else max(0, length - self.random.choice((0, 0, 0, 1, 3)))
        orders = self.random.random() < 0.7 and position and not self.steps.pending
        rows = tuple(self.random.randrange(3) for _ in range(3)) if orders else ()
        self.steps.go_back(position)
        what = StepRange(position, self.random.randint(1, 3), rows=rows)
        pending = self.steps.add(what, b"", False, 0.0)
        self.hops[0].link.append(Sent(pending.step, pending.what))

    def hop_takes_a_step(self) -> None:
        busy = [at for at, hop in enumerate(self.hops) if hop.link]
        if not busy:
            return
        at = self.random.choice(busy)
        hop = self.hops[at]
        one = hop.link.popleft()
        decision = hop.session.receive(one.step, one.what)
        if isinstance(decision, Compute):
            if not self._is_computed(hop, one, decision):
                self.broken = True
                for other in self.hops:
                    other.link.clear()
                return
            if one.step in self.steps.pending:
                assert hop.rows == self.wanted(one.step + 1)
        if at + 1 < len(self.hops):
            self.hops[at + 1].link.append(one)
        else:
            self.answers.add(one.step)

    def _is_computed(self, hop: Hop, one: Sent, decision: Compute) -> bool:
        hop.rows = [row[: one.what.position] for row in hop.rows]
        if self.random.random() < 0.05:
            hop.session.dropped(decision)
            return False
        self.happened["an order that was there already"] += bool(one.what.rows) and not decision.reorder
        if decision.reorder:
            hop.session.reordered(decision)
            hop.rows = [list(hop.rows[row]) for row in one.what.rows]
            if self.random.random() < 0.1:
                hop.session.dropped(decision)
                return False
        hop.session.computed(decision)
        hop.rows = rows_after(hop.rows, Sent(one.step, replace(one.what, rows=())))
        return True

    def answer_arrives(self) -> None:
        waiting = [each for each in self.steps.pending.values() if each.result is None]
        if waiting and waiting[0].step in self.answers:
            waiting[0].deliver(Result(waiting[0].step, waiting[0].what.position, b""), 1.0)

    def client_collects(self) -> None:
        pending = next(iter(self.steps.pending.values()), None)
        if pending is not None and pending.result is not None:
            before, self.taken = self.taken, self.wanted(pending.step + 1)
            self.steps.collected(pending)
            if pending.what.rows and self.random.random() < 0.1:
                self.taken = before  # its answer could not be read
                self.steps.revoke(pending)
                self.broken |= self.steps.give_up()
                assert self.broken

    def client_gives_up(self) -> None:
        self.broken |= self.steps.give_up()

    def _progress(self, session: ServerSession) -> HopProgress:
        kept = self.random.choice((0, 0, session.length // 2, session.length))
        last = session.last[0] if session.last is not None else None
        return HopProgress(session.length, kept, last, True, session.orders)

    def route_changes(self) -> None:
        """Some hops are replaced, and all are told how to resume, unless the change is disturbed."""
        for hop in self.hops:
            hop.link.clear()
        self.hops = [Hop() if self.random.random() < 0.2 else hop for hop in self.hops]
        told = self.random.choice((0, 1, 2, 3, 3, 3, 3))
        point = self.steps.resume_point()
        progress = [self._progress(hop.session) for hop in self.hops]
        wanted = self.wanted(point.step)
        for hop, order in list(zip(self.hops, plan(progress, point).orders, strict=True))[:told]:
            self.happened["a cache that begins again"] += hop.session.length > 0 == order.length
            hop.session.resume(order.length, point.step)
            hop.rows = [row[: order.length] for row in hop.rows]
            while hop.session.length < point.position:  # a replay, in parts
                start = hop.session.length
                stop = self.random.randint(start + 1, point.position)
                part = hop.session.replay(StepRange(start, stop - start))
                hop.rows = [row + wanted[index][start:stop] for index, row in enumerate(hop.rows)]
                hop.session.computed(part)
                if told < len(self.hops) and self.random.random() < 0.5:
                    break  # disturbed in the middle
            if hop.session.orders <= point.step:
                got = min(hop.session.length, point.position)
                assert [row[:got] for row in hop.rows] == [row[:got] for row in wanted]
        self.broken = told < len(self.hops)
        if not self.broken:
            self.hops[0].link.extend(Sent(each.step, each.what) for each in self.steps.again)


def test_orders_of_rows_are_applied_once_whatever_happens_to_the_hops():
    happened: Counter[str] = Counter()
    for seed in range(300):
        route = RowsOverARoute(seed)
        route.run(200)
        happened += route.happened
    assert min(happened["an order that was there already"], happened["a cache that begins again"]) > 50


# Standbys


def followed(session: ServerSession, position: int, tokens: int) -> Compute:
    """Take and compute a part that a standby gets."""
    decision = session.replay(StepRange(position, tokens), follows=True)
    session.computed(decision)
    return decision


def test_a_standby_goes_back_where_its_sender_did():
    session = ServerSession(MOST)
    assert followed(session, 0, 6).cut is None
    assert followed(session, 3, 1).cut == 3
    assert session.length == 4
    with pytest.raises(RemoteProtocolError, match="does not continue"):
        session.replay(StepRange(5, 1), follows=True)


def test_a_standby_that_cannot_go_back_begins_again_or_fails():
    session = ServerSession(MOST, can_cut=False)
    followed(session, 0, 6)
    assert followed(session, 0, 2).cut == 0
    with pytest.raises(RemoteProtocolError, match="does not continue"):
        session.replay(StepRange(1, 1), follows=True)


def test_what_a_standby_followed_is_forgotten_when_it_becomes_a_hop():
    session = ServerSession(MOST)
    followed(session, 0, 6)
    session.follow(4)
    session.resume(5, follows=True)
    assert session.followed == 4
    session.resume(5)
    assert session.followed is None
