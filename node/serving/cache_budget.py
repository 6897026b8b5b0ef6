"""Who holds how many pages of the KV cache, and who may have more: pure accounting.

A span's cache is cut into pages of `page_tokens` positions.  A row of a session holds the pages that
its positions fill, no matter how many it was opened for: memory follows use.  So more may be asked
for than there is, and somebody has to be told no in mid-session; whom, and why that never ends in a
deadlock, stands at `CacheBudget`.  What a token costs in bytes is the model's affair
(`ModelInfo.kv_bytes_per_token_per_block`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from tensor_codec.errors import CacheFull, LocalProtocolError

FREE_AGAIN_SECONDS = 2.0  # sessions end and are cut all the time
SHARE_AGAIN_SECONDS = 5.0  # the peer has to end one of its own first


@dataclass(slots=True)
class _Session:
    """One session's pages: those that it holds and those that it may come to hold, of all its rows.

    long: it may come to hold more than a peer's share.
    """

    peer: str
    rows: int
    max_length: int
    most: int
    long: bool = False
    pages: int = 0


@dataclass(slots=True)
class CacheBudget:
    """Pages that a span's sessions hold, and who may take another one.

    Promises, checked by tests/unit/test_cache_budget.py:
      * what is held never exceeds `tokens`; what one peer's sessions hold never exceeds its share, and
        what its long ones hold, those that may need more than a share, never `session_tokens`;
      * a refusal changes nothing: the session that hears CacheFull has its cache as it was;
      * the first session can always go on, up to the length that it was opened for: the oldest of those
        that are not long, and where there is none the oldest long one;
      * every other session can do so at the latest when all that are before it have ended;
      * releasing everything brings the budget back to where it began.

    The last but one is Dijkstra's banker (EWD 108) with one fixed order: by age, and the long ones behind
    all others.  For every session, what it may still need is covered by the free pages and those of the
    sessions before it:

        most - pages <= free + sum(pages of sessions before it)    (and the same inside its peer's share)

    A session is admitted with nothing in hand, and `most` no greater than what those behind it leave, so
    it holds then.  Pages that a session takes leave it true for itself and for those behind it (they are
    counted on the other side now); only for those before it is asked whether it stays true.  Nobody
    is before the first, which therefore is never refused.  A cut and an end keep it true for all.  So
    there is no state in which everyone waits: the first goes on, ends (each session has a greatest age),
    and the next one inherits its place.  One that is refused may wait for that, or its client closes it,
    which frees its pages, and goes elsewhere.

    What sessions must leave free is the most that a single one before them may still need, never the sum
    over them, so for all but the long ones it is at most one peer's share: a quarter of a large budget;
    half of one of twice `least_share_tokens`; and in a budget as small as `least_share_tokens` a session
    opened for all of it is served alone.  A long session takes what others leave, up to the whole: it
    costs them nothing before it has grown, and may have to wait for them.  No budget refuses what promising
    every session its whole length, in pages, would have let in.  Not guaranteed: that a session which
    was admitted gets beyond its first page at once, or at all before its client loses patience.

    tokens: of all sessions together.  share_per_peer: the part of them that one peer may hold, but
    never less than `least_share_tokens`.  page_tokens: positions of a page.  Parts of a page are never
    used.  max_session_tokens: of one session, and of the long ones of a peer; None: all.
    """

    tokens: int
    share_per_peer: float = 0.25
    least_share_tokens: int = 8192
    page_tokens: int = 16
    max_session_tokens: int | None = None
    _sessions: dict[bytes, _Session] = field(default_factory=dict)  # oldest first

    @property
    def free_tokens(self) -> int:
        """Tokens of the pages that nobody holds."""
        return self.page_tokens * (self._all_pages - _held(self._sessions.values()))

    @property
    def peer_tokens(self) -> int:
        """Tokens of the pages that one peer may hold, its long sessions left out."""
        return self.page_tokens * self._peer_pages

    @property
    def session_tokens(self) -> int:
        """Tokens of the pages that one session may come to hold."""
        return self.page_tokens * self._session_pages

    def held_tokens(self, peer: str) -> int:
        """Tokens of the pages that this peer's sessions hold."""
        return self.page_tokens * _held(self._of(peer))

    def admit(self, session: bytes, peer: str, rows: int, max_length: int) -> None:
        """Give a session of `rows` x `max_length` its place; it holds no page yet.

        Raises CacheFull, and then nothing has changed: for ever where it is larger than a session may be,
        for a while where a first page for each row is not to be had.
        """
        if session in self._sessions:
            raise LocalProtocolError("a session was admitted twice")
        most = rows * self._pages(max_length)
        new = _Session(peer, rows, max_length, most, long=most > self._peer_pages)
        if most > self._session_pages:
            raise CacheFull(
                f"a session of {rows} x {max_length} tokens takes {most * self.page_tokens} in pages of"
                f" {self.page_tokens}, {self.session_tokens} are allowed a session here"
                " (--max-session-tokens, --cache-tokens)"
            )
        self._check_place(new)
        self._check(new, rows)
        self._sessions[session] = new

    def grow(self, session: bytes, length: int) -> None:
        """Let every row have room for the positions before `length`; it may have more already.

        Raises CacheFull, and then nothing has changed.
        """
        mine = self._sessions[session]
        if length > mine.max_length:
            raise LocalProtocolError(f"{length} positions in a session opened for {mine.max_length}")
        more = mine.rows * self._pages(length) - mine.pages
        if more > 0:
            self._check(mine, more)
            mine.pages += more

    def shrink(self, session: bytes, length: int) -> None:
        """Take back the pages that hold only positions from `length` on."""
        mine = self._sessions[session]
        mine.pages = min(mine.pages, mine.rows * self._pages(length))

    def release(self, session: bytes) -> None:
        """Take back a session's pages and its place."""
        del self._sessions[session]

    @property
    def _all_pages(self) -> int:
        return self.tokens // self.page_tokens

    @property
    def _peer_pages(self) -> int:
        share = max(int(self.tokens * self.share_per_peer), min(self.tokens, self.least_share_tokens))
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
        """Whether a newcomer can be promised its length beside those behind it, and a page for each row.

        Raises CacheFull.
        """
        behind = _held(session for session in self._sessions.values() if session.long > new.long)
        if new.most > self._all_pages - behind:
            raise CacheFull(
                f"{new.most * self.page_tokens} tokens of {self.tokens}, longer sessions hold"
                f" {behind * self.page_tokens}",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )
        rows = sum(session.rows for session in self._sessions.values())
        if rows + new.rows > self._all_pages:  # what a row takes beside its pages is bounded so
            raise CacheFull(
                f"{new.rows} rows beside {rows}, {self._all_pages} are allowed here",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )

    def _check(self, mine: _Session, more: int) -> None:
        """Whether `mine` may have `more` pages.  Raises CacheFull."""
        page = self.page_tokens
        alike = [session for session in self._of(mine.peer) if session.long == mine.long]
        share, what = self._peer_pages, "a peer here"
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
    """Pages of `capacity` that `mine` may take so that all before it can still go on in their order.

    sessions: those that share the capacity, oldest first; a newcomer is not among them yet.
    """
    sessions = sorted(sessions, key=lambda session: session.long)
    reserve = before = 0
    for session in sessions:
        if session is mine or session.long > mine.long:
            break
        reserve = max(reserve, session.most - session.pages - before)
        before += session.pages
    return max(0, capacity - _held(sessions) - reserve)


@dataclass(slots=True)
class CacheAdmission:
    """A budget, and those who wait for a part of it.  wait_seconds: how long at the most."""

    budget: CacheBudget
    wait_seconds: float
    _more: trio.Event = field(default_factory=trio.Event)

    async def admit(self, session: bytes, peer: str, rows: int, max_length: int) -> None:
        """See `CacheBudget.admit`, after a bounded wait."""
        await self._when_there_is(partial(self.budget.admit, session, peer, rows, max_length))

    async def grow(self, session: bytes, length: int) -> None:
        """See `CacheBudget.grow`, after a bounded wait."""
        await self._when_there_is(partial(self.budget.grow, session, length))

    def shrink(self, session: bytes, length: int) -> None:
        """See `CacheBudget.shrink`; who waits looks again."""
        self.budget.shrink(session, length)
        self._there_is_more()

    def release(self, session: bytes) -> None:
        """See `CacheBudget.release`; who waits looks again."""
        self.budget.release(session)
        self._there_is_more()

    async def _when_there_is(self, take: Callable[[], None]) -> None:
        deadline = trio.current_time() + self.wait_seconds
        while True:
            try:
                return take()
            except CacheFull as full:
                if full.retry_after_seconds is None or trio.current_time() >= deadline:
                    raise
            with trio.move_on_at(deadline):
                await self._more.wait()

    def _there_is_more(self) -> None:
        self._more.set()
        self._more = trio.Event()
