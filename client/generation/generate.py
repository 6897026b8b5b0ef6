"""The loop of a generation: logits, a token, its text, and again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Generator, Tensor

from client.generation.conversation import Conversation
from client.generation.generation_config import Settings
from client.generation.sampling import Choice, Sampler
from client.generation.text import TextStream
from client.speculation.speculation import Speculation

FinishReason = Literal["length", "end", "stop"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    text: the text that became certain with it; may be empty (a character not whole yet, a possible
    stop string).  seconds: since the token before, or since the call for the first.
    finish_reason: None but for the last: "length", "end" (the model's end token, whose text is
    left out), "stop" (a stop string or a token of `stop_token_ids`, left out as well).
    logprob: its natural log probability; top_logprobs: of the likeliest tokens, the likeliest first,
    by token id.  Both are None unless they were asked for, and both are of the model's own
    distribution, before penalties, bans, temperature and filters (vLLM's default, "raw_logprobs").
    """

    id: int
    text: str
    seconds: float
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


class TokenModel(Protocol):
    """The part of `node.model.embed_and_head.EmbedAndHead` that a generation needs."""

    @property
    def tokenizer(self) -> Any:  # Any: the library's tokenizers are not typed
        """From tokens to text."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""


@dataclass(slots=True)
class Generation:
    """One call of `Swarm.generate`."""

    local_model: TokenModel
    conversation: Conversation
    settings: Settings
    generator: Generator | None = None  # of random numbers, in place of the options' seed
    speculation: Speculation | None = None  # guesses tokens; the tokens are the same without
    _tokens: list[int] = field(default_factory=list)
    _left: int = 0  # tokens that may come after the next one
    _piece: str | None = None  # of the text, where it was made before the next step was sent

    @property
    def _end_ids(self) -> frozenset[int]:
        eos_ids = self.settings.eos_ids
        return self.local_model.eos_ids if eos_ids is None else eos_ids

    async def run(self, prompt: list[int], *, close: bool) -> AsyncGenerator[Token, None]:
        """Yield tokens until one has a finish_reason.  close: end the conversation's session afterwards."""
        sampler = Sampler(
            self.settings.options,
            end_ids=self._end_ids,
            prompt_tokens=len(prompt),
            max_length=len(prompt) + self.settings.max_new_tokens,
            generator=self.generator,
        )
        text = TextStream(
            self.local_model.tokenizer,
            self.settings.stop,
            prompt=prompt,
            skip_special_tokens=self.settings.options.skip_special_tokens is not False,
        )
        self._tokens = list(prompt)

        def choose(logits: Tensor) -> Choice:
            return sampler.choose(logits, self._tokens)

        def follow(choice: Choice) -> int | None:
            if self.speculation is not None:
                self.speculation.see(choice.token, room=self._left)
            return choice.token if self._goes_on(text, choice.token) else None

        try:
            began = time.perf_counter()
            if self.speculation is not None:
                ends = self._end_ids | set(self.settings.options.stop_token_ids or ())
                await self.speculation.begin(prompt, ends)
            for left in range(self.settings.max_new_tokens - 1, -1, -1):
                self._left = left
                choice = await self.conversation.logits_after(
                    self._tokens,
                    choose,
                    best=Choice if self.settings.options.best_only else None,
                    prompt=len(prompt),
                    follow=follow,
                    drafting=self.speculation,
                )
                token, logprob, top = choice
                self._tokens.append(token)
                piece, reason = self._text_of(text, token)
                now = time.perf_counter()
                yield Token(token, piece, now - began, reason, logprob, top)
                if reason is not None:
                    return
                began = now
        finally:
            if self.speculation is not None:
                self.speculation.end()
                self.conversation.keep(self._tokens)
            if close:
                self.conversation.close()

    def _goes_on(self, text: TextStream, token: int) -> bool:
        """Whether another token surely comes after `token`.

        Its text waits until the next step was sent, unless it may hold a stop string.
        """
        self._piece = None
        if not self._left or token in self._end_ids or token in (self.settings.options.stop_token_ids or ()):
            return False
        if self.settings.stop:
            self._piece = text.push(token)
        return not text.stopped

    def _text_of(self, text: TextStream, token: int) -> tuple[str, FinishReason | None]:
        """The text that `token` makes certain, and whether it is the last one."""
        if token in self._end_ids:
            return text.finish(), "stop" if text.found else "end"
        if token in (self.settings.options.stop_token_ids or ()):
            return text.finish(), "stop"
        piece = text.push(token) if self._piece is None else self._piece
        if self._left == 0 and not text.stopped:
            piece += text.finish()
        if text.found:
            return piece, "stop"
        return piece, "length" if self._left == 0 else None
