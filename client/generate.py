"""The loop of a generation: logits, a token, its text, and again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from client.retry import Context
from client.sampling import Sampler, SamplingOptions
from client.text import TextStream
from node.model.ends import Ends

FinishReason = Literal["length", "end", "stop"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    text: what became certain with it; may be empty (a character not whole yet, a possible stop
    string).  seconds: since the one before, or since the call for the first.
    finish_reason: None but for the last: "length", "end" (the model's end token, whose text is
    left out), "stop" (a stop string, left out as well).
    """

    id: int
    text: str
    seconds: float
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Generation:
    """One call of `Swarm.generate`."""

    ends: Ends
    context: Context
    options: SamplingOptions
    stop: tuple[str, ...]
    max_new_tokens: int
    _tokens: list[int] = field(default_factory=list)

    async def run(self, prompt: list[int], *, close: bool) -> AsyncGenerator[Token, None]:
        """Yield tokens until one has a finish_reason.  close: end the context's session afterwards."""
        sampler = Sampler(self.options)
        text = TextStream(self.ends.tokenizer, self.stop, prompt=prompt)
        self._tokens = list(prompt)

        def pick(logits: Tensor) -> int:
            return sampler.pick(logits, self._tokens)

        try:
            began = time.perf_counter()
            for left in range(self.max_new_tokens - 1, -1, -1):
                token = await self.context.logits_after(
                    self._tokens, pick, best_only=self.options.best_only, prompt=len(prompt)
                )
                self._tokens.append(token)
                piece, reason = self._tell(text, token, left)
                now = time.perf_counter()
                yield Token(token, piece, now - began, reason)
                if reason is not None:
                    return
                began = now
        finally:
            if close:
                self.context.close()

    def _tell(self, text: TextStream, token: int, left: int) -> tuple[str, FinishReason | None]:
        """The text that `token` makes certain, and whether it is the last one."""
        if token in self.ends.eos_ids:
            return text.finish(), "stop" if text.found else "end"
        piece = text.push(token)
        if left == 0 and not text.stopped:
            piece += text.finish()
        if text.found:
            return piece, "stop"
        return piece, "length" if left == 0 else None
