"""What a gateway knows of a request that it serves, for metrics and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RequestKind = Literal["chat", "completion", "response"]


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request from its arrival to its end.

    id: of its answers and of its trace.  route: its path, one of a few.  caller: of the key.
    began: Unix time.  queued_seconds: until it began to compute.  traced: its caller wants to know its steps.
    """

    id: str
    kind: RequestKind
    route: str
    model: str
    caller: str
    began: float
    max_tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queued_seconds: float = 0.0
    traced: bool = False

    def begin(self, queued_seconds: float) -> None:
        """It has left the queue."""
        self.queued_seconds = queued_seconds

    def reuse(self, tokens: int) -> None:
        """So many tokens more of its prompts were in the caches, and were not computed again."""
        self.cached_tokens += tokens

    def count(self) -> None:
        """A token more."""
        self.completion_tokens += 1


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of an answer.  cached_tokens: of the prompt, those that no server has computed for it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def body(self) -> dict[str, object]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
