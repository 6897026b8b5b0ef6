"""The KV cache's budget: how many pages each session holds, and which session may have more.

A span's cache is cut into pages of `page_tokens` positions.  A row of a session holds the pages that its
positions fill, at any length that the session was opened for: memory follows use.  So sessions may ask for
more pages than exist, and a session may be refused after it has begun; `CacheBudget` says which one, and why
no deadlock follows.  The bytes of a token are the model's (`ModelInfo.kv_bytes_per_token_per_block`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import trio

from node.serving.fair_shares import who_yields
from tensor_codec.errors import CacheFull, LocalProtocolError

FREE_AGAIN_SECONDS = 2.0  # sessions end, and caches are cut, all the time
SHARE_AGAIN_SECONDS = 5.0  # the peer must end one of its own sessions first


@dataclass(slots=True)
class _Session:
    """One session's pages, of all its rows.

    prefix: of the peer's address.  max_pages: that it may come to hold; pages: that it holds.  long: whether
    max_pages exceeds a peer's share.  yields: it is about to end, for others.
    """

    peer: str
    rows: int
    max_length: int
    max_pages: int
    long: bool = False
    prefix: str = ""
    pages: int = 0
    yields: bool = False

    @property
    def weight(self) -> int:
        """Its part of the cache: a row takes a place before it has a page."""
        return max(self.pages, self.rows)


@dataclass(slots=True)
class CacheBudget:
    """The pages that a span's sessions hold, and which session may take another one.

    Promises, checked by tests/unit/test_cache_budget.py:
      * held pages never exceed `tokens`; the pages of one peer's sessions never exceed its share, and the
        pages of its long sessions, whose maximum exceeds a share, never exceed `session_tokens`;
      * a refusal changes nothing: after CacheFull the session's cache is as it was;
      * the first session can always go on, up to the length that it was opened for: the first one is the
        oldest that is not long, and without one the oldest long session;
      * every other session can do so at the latest when all sessions before it have ended;
      * releasing all sessions brings the budget back to its beginning;
      * while peers of other prefixes wait, a prefix that holds more than its share gives sessions up, its
        youngest first; while none waits, and among peers of one prefix, none is given up.

    The last but one is Dijkstra's banker (EWD 108) with one fixed order: by age, long sessions after all
    others.  For every session, the free pages and the pages of the sessions before it cover its further need:

        max_pages - pages <= free + sum(pages of sessions before it)    (and also inside its peer's share)

    A session is admitted without a page, and with `max_pages` no greater than the sessions after it leave, so
    the inequality holds then.  Pages that a session takes leave it true for that session and for the sessions
    after it, where they count on the right side now; it is checked only for the sessions before it.  No
    session is before the first, so the first is never refused.  A cut and an end keep the inequality true for
    all.  So there is no state in which all wait: the first session goes on and ends (each session has a
    maximum age), and the next one takes its place.  A refused session may wait for that, or its client closes
    it, which frees its pages, and goes elsewhere.

    Sessions must leave free the largest further need of a single session before them, never the sum.  For all
    but long sessions that is at most one peer's share: a quarter of a large budget; half of a budget of twice
    `least_share_tokens`; in a budget of `least_share_tokens` a session opened for all of it is served alone.
    A long session takes the pages that others leave, up to all: it costs them nothing before it has grown,
    and may have to wait for them.  The budget never refuses a session that would fit if every session were
    given its whole length at once.  Not guaranteed: that an admitted session gets beyond its first page at
    once, or before its client gives up.

    tokens: of all sessions together.  share_per_peer: the part of them that one peer may hold, but never less
    than `least_share_tokens`.  page_tokens: positions of a page.  Parts of a page are never used.
    max_session_tokens: of one session, and of all long sessions of a peer; None: all.
    own_shares: peers with another part than `share_per_peer`, and that part.
    """

    tokens: int
    share_per_peer: float = 0.25
    least_share_tokens: int = 8192
    page_tokens: int = 16
    max_session_tokens: int | None = None
    own_shares: Mapping[str, float] = field(default_factory=dict)
    _sessions: dict[Hashable, _Session] = field(default_factory=dict)  # oldest first

    @property
    def all_tokens(self) -> int:
        """Tokens of all pages."""
        return self.page_tokens * self._all_pages

    @property
    def free_tokens(self) -> int:
        """Tokens of the pages that nobody holds."""
        return self.page_tokens * (self._all_pages - _held(self._sessions.values()))

    @property
    def peer_tokens(self) -> int:
        """Tokens of the pages that a peer without a share of its own may hold, its long sessions left out."""
        return self.page_tokens * self._pages_of("")

    @property
    def session_tokens(self) -> int:
        """Tokens of the pages that one session may come to hold."""
        return self.page_tokens * self._session_pages

    def held_tokens(self, peer: str) -> int:
        """Tokens of the pages that this peer's sessions hold."""
        return self.page_tokens * _held(self._of(peer))

    def admit(self, session: Hashable, peer: str, rows: int, max_length: int, prefix: str = "") -> None:
        """Admit a session of `rows` x `max_length`; it holds no page yet.

        prefix: of the peer's address.
        Raises CacheFull, and then nothing has changed: for good where the session is larger than a session
        may be, for a while where a first page for each row is missing.
        """
        if session in self._sessions:
            raise LocalProtocolError("a session was admitted twice")
        max_pages = rows * self._pages(max_length)
        new = _Session(peer, rows, max_length, max_pages, max_pages > self._pages_of(peer), prefix)
        if max_pages > self._session_pages:
            raise CacheFull(
                f"a session of {rows} x {max_length} tokens takes {max_pages * self.page_tokens} in pages of"
                f" {self.page_tokens}, {self.session_tokens} are allowed a session here"
                " (--max-session-tokens, --cache-tokens)"
            )
        self._check_place(new)
        self._check(new, rows)
        self._sessions[session] = new

    def grow(self, session: Hashable, length: int) -> None:
        """Give every row pages for the positions before `length`; it may have more already.

        Raises CacheFull, and then nothing has changed.
        """
        mine = self._sessions[session]
        if length > mine.max_length:
            raise LocalProtocolError(f"{length} positions in a session opened for {mine.max_length}")
        more = mine.rows * self._pages(length) - mine.pages
        if more > 0:
            self._check(mine, more)
            mine.pages += more

    def shrink(self, session: Hashable, length: int) -> None:
        """Take back the pages that hold only positions from `length` on."""
        mine = self._sessions[session]
        mine.pages = min(mine.pages, mine.rows * self._pages(length))

    def release(self, session: Hashable) -> None:
        """End a session: take back its pages."""
        del self._sessions[session]

    def asker_of(self, session: Hashable) -> tuple[str, str]:
        """The prefix of the address of a session's peer, and the peer."""
        found = self._sessions[session]
        return found.prefix, found.peer

    def make_yield(self, prefix: str, peer: str = "") -> Hashable | None:
        """The session that has to end so that a peer of this prefix gets pages; None where none has to.

        It is not named again.  See `node.serving.fair_shares`.
        """
        found = who_yields(self._sessions.values(), prefix, self._all_pages, peer, self.own_shares)
        if found is None:
            return None
        found.yields = True
        return next(key for key, session in self._sessions.items() if session is found)

    @property
    def _all_pages(self) -> int:
        return self.tokens // self.page_tokens

    def _pages_of(self, peer: str) -> int:
        """Pages that a peer may hold."""
        part = self.own_shares.get(peer, self.share_per_peer)
        share = max(int(self.tokens * part), min(self.tokens, self.least_share_tokens))
        return share // self.page_tokens

    @property
    def _session_pages(self) -> int:
        if self.max_session_tokens is None:
            return self._all_pages
        return min(self._all_pages, self._pages(self.max_session_tokens))

    def _pages(self, length: int) -> int:
        return -(-length // self.page_tokens)

    def _of(self, peer: str) -> list[_Session]:
        return [session for session in self._sessions.values() if session.peer == peer]

    def _check_place(self, new: _Session) -> None:
        """Raise CacheFull unless a new session fits besides the sessions after it, each row with a page."""
        after = _held(session for session in self._sessions.values() if session.long > new.long)
        if new.max_pages > self._all_pages - after:
            raise CacheFull(
                f"{new.max_pages * self.page_tokens} tokens of {self.tokens}, longer sessions hold"
                f" {after * self.page_tokens}",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )
        rows = sum(session.rows for session in self._sessions.values())
        if rows + new.rows > self._all_pages:  # bounds the memory of rows besides their pages
            raise CacheFull(
                f"{new.rows} rows beside {rows}, {self._all_pages} are allowed here",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )

    def _check(self, mine: _Session, more: int) -> None:
        """Raise CacheFull unless `mine` may have `more` pages."""
        page = self.page_tokens
        alike = [session for session in self._of(mine.peer) if session.long == mine.long]
        share, what = self._pages_of(mine.peer), "a peer here"
        if mine.long:
            share, what = self._session_pages, "the long sessions of a peer here"
        spare = _spare(mine, alike, share)
        if more > spare:
            raise CacheFull(
                f"{more * page} tokens more than the {_held(alike) * page} that you hold, {spare * page}"
                f" are to be had beside what your older sessions may need, {share * page} are allowed"
                f" {what}",
                retry_after_seconds=SHARE_AGAIN_SECONDS,
            )
        spare = _spare(mine, self._sessions.values(), self._all_pages)
        if more > spare:
            raise CacheFull(
                f"{more * page} tokens more, {self.free_tokens} of {self.tokens} are free"
                f" and {spare * page} to be had beside what"
                f" {'other' if mine.long else 'older'} sessions may need",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )


def _held(sessions: Iterable[_Session]) -> int:
    return sum(session.pages for session in sessions)


def _spare(mine: _Session, sessions: Iterable[_Session], capacity: int) -> int:
    """Pages of `capacity` that `mine` may take so that all sessions before it can still go on in order.

    sessions: the sessions that share the capacity, oldest first; a new session is not among them yet.
    """
    sessions = sorted(sessions, key=lambda session: session.long)
    reserve = before = 0
    for session in sessions:
        if session is mine or session.long > mine.long:
            break
        reserve = max(reserve, session.max_pages - session.pages - before)
        before += session.pages
    return max(0, capacity - _held(sessions) - reserve)


@dataclass(slots=True)
class CacheAdmission:
    """A budget, and the callers that wait for a part of it.

    wait_seconds: at most for each.  end: ends a session that has to give way, when half of that is over.
    """

    budget: CacheBudget
    wait_seconds: float
    end: Callable[[Hashable], None] = lambda _: None
    _more: trio.Event = field(default_factory=trio.Event)

    async def admit(self, session: Hashable, peer: str, rows: int, max_length: int, prefix: str = "") -> None:
        """See `CacheBudget.admit`, after a bounded wait."""
        take = partial(self.budget.admit, session, peer, rows, max_length, prefix)
        await self._with_patience(take, lambda: (prefix, peer))

    async def grow(self, session: Hashable, length: int) -> None:
        """See `CacheBudget.grow`, after a bounded wait."""
        try:
            self.budget.grow(session, length)  # mostly; for every token
        except CacheFull:
            take = partial(self.budget.grow, session, length)
            await self._with_patience(take, partial(self.budget.asker_of, session))

    def grow_now(self, session: Hashable, length: int) -> bool:
        """See `CacheBudget.grow`; False where there is no room at once."""
        try:
            self.budget.grow(session, length)
        except CacheFull:
            return False
        return True

    def shrink(self, session: Hashable, length: int) -> None:
        """See `CacheBudget.shrink`; waiting callers try again."""
        self.budget.shrink(session, length)
        self.wake()

    def release(self, session: Hashable) -> None:
        """See `CacheBudget.release`; waiting callers try again."""
        self.budget.release(session)
        self.wake()

    async def _with_patience(self, take: Callable[[], None], asker: Callable[[], tuple[str, str]]) -> None:
        began = trio.current_time()
        ask_at, deadline = began + self.wait_seconds / 2, began + self.wait_seconds
        while True:
            try:
                return take()
            except CacheFull as full:
                now, again = trio.current_time(), full.retry_after_seconds
                if again is None or now >= deadline:
                    raise
            yields = None
            if now >= ask_at and again == FREE_AGAIN_SECONDS:
                yields = self.budget.make_yield(*asker())
            if yields is not None:
                self.end(yields)
            with trio.move_on_at(ask_at if now < ask_at else deadline):
                await self._more.wait()

    def wake(self) -> None:
        """Have waiting callers try again."""
        self._more.set()
        self._more = trio.Event()
