"""Who holds how many pages of the KV cache, and who may have more: pure accounting.

A span's cache is cut into pages of `page_tokens` positions.  A row of a session holds the pages that
its positions fill, no matter how many it was opened for: memory follows use.  So more may be asked
for than there is, and somebody has to be told no in mid-session; whom, and why that never ends in a
deadlock, stands at `CacheBudget`.  What a token costs in bytes is the model's affair
(`ModelInfo.kv_bytes_per_token_per_block`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tensor_codec.errors import CacheFull, LocalProtocolError

FREE_AGAIN_SECONDS = 2.0  # sessions end and are cut all the time
SHARE_AGAIN_SECONDS = 5.0  # the peer has to end one of its own first


@dataclass(slots=True)
class _Session:
    """One session's pages: those that it holds and those that it may come to hold, of all its rows."""

    peer: str
    rows: int
    max_length: int
    most: int
    pages: int = 0


@dataclass(slots=True)
class CacheBudget:
    """Pages that a span's sessions hold, and who may take another one.

    Promises, checked by tests/unit/test_cache_budget.py:
      * what is held never exceeds `tokens`, and what one peer holds never exceeds its share;
      * a refusal changes nothing: the session that hears CacheFull has its cache as it was;
      * the oldest session can always go on, up to the length that it was opened for;
      * every other session can do so at the latest when all that are older have ended;
      * releasing everything brings the budget back to where it began.

    The last but one is Dijkstra's banker (EWD 108) with one fixed order, the order of admission.  For
    every session, what it may still need is covered by the free pages and those of older sessions:

        most - pages <= free + sum(pages of older sessions)        (and the same inside its peer's share)

    A session is admitted with nothing in hand and `most` no greater than the whole, so it holds then.
    Pages that a session takes leave it true for itself and for younger ones (they are counted on the
    other side now); only for older ones it is asked whether it stays true.  Nobody is older than the
    oldest, which therefore is never refused.  A cut and an end keep it true for all.  So there is no
    state in which everyone waits: the oldest goes on, ends (each session has a greatest age), and the
    next oldest inherits its place.  A younger one that is refused may wait for that, or its client
    closes it, which frees its pages, and goes elsewhere.

    What younger sessions must leave free is the most that a single older one may still need, never
    the sum over them, so it is at most one peer's share: a quarter of a large budget; half of one of
    twice `least_share_tokens`; and in a budget as small as `least_share_tokens` a session opened for
    all of it is served alone.  No budget refuses what promising every session its whole length, in
    pages, would have let in.  Not guaranteed: that a session which was admitted gets beyond its first page at
    once, or at all before its client loses patience.

    tokens: of all sessions together.  share_per_peer: the part of them that one peer may hold, but
    never less than `least_share_tokens`, so that one session of the largest allowed size fits.
    page_tokens: positions of a page.  Parts of a page are never used.
    """

    tokens: int
    share_per_peer: float = 0.25
    least_share_tokens: int = 8192
    page_tokens: int = 16
    _sessions: dict[bytes, _Session] = field(default_factory=dict)  # oldest first

    @property
    def free_tokens(self) -> int:
        """Tokens of the pages that nobody holds."""
        return self.page_tokens * (self._all_pages - _held(self._sessions.values()))

    @property
    def peer_tokens(self) -> int:
        """Tokens of the pages that one peer may hold."""
        return self.page_tokens * self._peer_pages

    def held_tokens(self, peer: str) -> int:
        """Tokens of the pages that this peer's sessions hold."""
        return self.page_tokens * _held(self._of(peer))

    def admit(self, session: bytes, peer: str, rows: int, max_length: int) -> None:
        """Give a session of `rows` x `max_length` its place; it holds no page yet.

        Raises CacheFull, and then nothing has changed: for ever where it is larger than a peer's
        share, for a while where a first page for each row is not to be had.
        """
        if session in self._sessions:
            raise LocalProtocolError("a session was admitted twice")
        new = _Session(peer, rows, max_length, most=rows * self._pages(max_length))
        if new.most > self._peer_pages:
            raise CacheFull(
                f"a session of {rows} x {max_length} tokens takes {new.most * self.page_tokens} in pages of"
                f" {self.page_tokens}, {self.peer_tokens} are allowed a peer here"
            )
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

    def _pages(self, length: int) -> int:
        return -(-length // self.page_tokens)

    def _of(self, peer: str) -> list[_Session]:
        return [session for session in self._sessions.values() if session.peer == peer]

    def _check(self, mine: _Session, more: int) -> None:
        """Whether `mine` may have `more` pages.  Raises CacheFull."""
        peer, page = mine.peer, self.page_tokens
        spare = _spare(mine, self._of(peer), self._peer_pages)
        if more > spare:
            raise CacheFull(
                f"{more * page} tokens more than the {self.held_tokens(peer)} that you hold, {spare * page}"
                f" are to be had beside what your older sessions may need, {self.peer_tokens} are allowed"
                " a peer here",
                retry_after_seconds=SHARE_AGAIN_SECONDS,
            )
        spare = _spare(mine, self._sessions.values(), self._all_pages)
        if more > spare:
            raise CacheFull(
                f"{more * page} tokens more, {self.free_tokens} of {self.tokens} are free"
                f" and {spare * page} to be had beside what older sessions may need",
                retry_after_seconds=FREE_AGAIN_SECONDS,
            )


def _held(sessions: Iterable[_Session]) -> int:
    return sum(session.pages for session in sessions)


def _spare(mine: _Session, sessions: Iterable[_Session], capacity: int) -> int:
    """Pages of `capacity` that `mine` may take so that all older ones can still go on in their order.

    sessions: those that share the capacity, oldest first; a newcomer is not among them yet.
    """
    sessions = list(sessions)
    reserve = older = 0
    for session in sessions:
        if session is mine:
            break
        reserve = max(reserve, session.most - session.pages - older)
        older += session.pages
    return max(0, capacity - _held(sessions) - reserve)
