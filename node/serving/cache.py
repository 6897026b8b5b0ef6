"""How many tokens of KV cache are promised, to whom: pure accounting, admission before allocation.

A session is admitted for batch * max_length tokens and its memory grows as it is used, so the
budget can never be overrun.  Tokens are counted per span: what one costs in bytes is the model's
affair (`ModelInfo.kv_bytes_per_token_per_block`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tensor_codec.errors import CacheFull, LocalProtocolError


@dataclass(slots=True)
class CacheBudget:
    """Tokens that a span's caches may hold, and who holds them.

    Promises, checked by tests/unit/test_cache_budget.py:
      * what is promised never exceeds `tokens`, and no peer's part exceeds its share;
      * releasing everything brings the budget back to where it began.

    tokens: of all sessions together.  share_per_peer: the part of them that one peer may hold, but
    never less than `least_share_tokens`, so that one session of the largest allowed size fits.
    """

    tokens: int
    share_per_peer: float = 0.25
    least_share_tokens: int = 8192
    _held: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    _by_peer: Counter[str] = field(default_factory=Counter)

    @property
    def free_tokens(self) -> int:
        """Tokens that nobody holds."""
        return self.tokens - sum(tokens for _, tokens in self._held.values())

    @property
    def peer_tokens(self) -> int:
        """Tokens that one peer may hold."""
        return max(int(self.tokens * self.share_per_peer), min(self.tokens, self.least_share_tokens))

    def admit(self, session: bytes, peer: str, tokens: int) -> None:
        """Promise `tokens` to a session.  Raises CacheFull, and then nothing has changed."""
        if session in self._held:
            raise LocalProtocolError("a session was admitted twice")
        if tokens > self.peer_tokens:
            raise CacheFull(f"a session of {tokens} tokens, {self.peer_tokens} are allowed a peer here")
        if self._by_peer[peer] + tokens > self.peer_tokens:
            raise CacheFull(
                f"{tokens} tokens more than the {self._by_peer[peer]} that you hold,"
                f" {self.peer_tokens} are allowed a peer here",
                retry_after_seconds=5.0,
            )
        if tokens > self.free_tokens:
            raise CacheFull(
                f"a session of {tokens} tokens, {self.free_tokens} of {self.tokens} are free",
                retry_after_seconds=2.0,
            )
        self._held[session] = (peer, tokens)
        self._by_peer[peer] += tokens

    def release(self, session: bytes) -> None:
        """Take a session's tokens back."""
        peer, tokens = self._held.pop(session)
        self._by_peer[peer] -= tokens
        if not self._by_peer[peer]:
            del self._by_peer[peer]
