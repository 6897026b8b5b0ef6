"""The bytes of deep prompts that open sessions hold, of each peer and of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from node.serving.span_admission import SpanAdmission
from tensor_codec.errors import CacheFull, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.session import check_prompts, peek_open

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

    def check(self, peer: str, size: int) -> None:
        """Raise CacheFull where `size` more bytes of a peer's session have no room."""
        for used, most in (
            (self._by_peer[peer], self.limits.max_prompt_bytes_per_peer),
            (self.used, self.limits.max_prompt_bytes),
        ):
            if size > most - used:
                raise CacheFull(
                    f"prompts of {size} bytes, {max(0, most - used)} of {most} are free", AGAIN_SECONDS
                )

    def judge(self, admission: SpanAdmission, peer: str, beginning: bytes, size: int) -> Refused | None:
        """Whether the prompts of an Open are taken, before they have come; the reason if not.

        beginning: of its frame, with the header; size: of all of it.  Raises MessageError.
        """
        opened, body_bytes = peek_open(beginning, size)
        try:
            admission.admits(opened.spec)
            check_prompts(opened, admission.spec.hidden, body_bytes)
            self.check(peer, body_bytes)
        except Refused as refusal:
            return refusal
        return None

    @contextmanager
    def hold(self, peer: str, size: int) -> Iterator[None]:
        """Count `size` bytes of a peer's session within the context.  Raises CacheFull."""
        self.check(peer, size)
        self._by_peer[peer] += size
        try:
            yield
        finally:
            self._by_peer[peer] -= size
            if not self._by_peer[peer]:
                del self._by_peer[peer]
