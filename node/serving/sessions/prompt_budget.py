"""The bytes of deep prompts that open sessions hold, of each peer and of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensor_codec.errors import CacheFull
from tensor_codec.limits import Limits

AGAIN_SECONDS = 5.0  # a session must end first


@dataclass(slots=True)
class PromptBudget:
    """Admits prompts up to `max_prompt_bytes`, and those of one peer up to `max_prompt_bytes_per_peer`."""

    limits: Limits
    _by_peer: Counter[str] = field(default_factory=Counter)

    @property
    def used(self) -> int:
        """Bytes that sessions hold now."""
        return self._by_peer.total()

    @contextmanager
    def hold(self, peer: str, size: int) -> Iterator[None]:
        """Count `size` bytes of a peer's session within the context.  Raises CacheFull."""
        for used, most in (
            (self._by_peer[peer], self.limits.max_prompt_bytes_per_peer),
            (self.used, self.limits.max_prompt_bytes),
        ):
            if size > most - used:
                raise CacheFull(
                    f"prompts of {size} bytes, {max(0, most - used)} of {most} are free", AGAIN_SECONDS
                )
        self._by_peer[peer] += size
        try:
            yield
        finally:
            self._by_peer[peer] -= size
            if not self._by_peer[peer]:
                del self._by_peer[peer]
