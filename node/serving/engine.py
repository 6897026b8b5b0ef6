"""Runs steps over one span in the torch thread, and knows how fast that goes.

One step runs at a time, first come, first served; how many may wait is bounded, for all and for
each peer.  From wire bytes to wire bytes a step crosses into the thread once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from node.compute import ComputeThread
from node.model.cache import SpanCache
from node.model.span import Span
from node.serving.session import Compute
from tensor_codec.compression import decode_hidden, encode_hidden
from tensor_codec.errors import BadResult, TooManyStreams
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages import Contract

EMA_WEIGHT = 0.1  # of the newest step in the running rates
DECODE_TOKENS = 4  # steps of at most so many tokens count as decode, larger ones as prefill


class NotFinite(BadResult):
    """What came in was finite and what our own span made of it is not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Encoded hidden states [batch, tokens, hidden], and the microseconds spent on computing them."""

    body: Buffer
    compute_micros: int


@dataclass(slots=True)
class Rates:
    """Seconds that a block takes: for one decode step, and for each token of a prefill."""

    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float

    def observe(self, tokens: int, blocks: int, seconds: float) -> None:
        """Fold a served step into the running averages."""
        per_block = seconds / blocks
        if tokens <= DECODE_TOKENS:
            self.decode_seconds_per_block += EMA_WEIGHT * (per_block - self.decode_seconds_per_block)
        else:
            per_token = per_block / tokens
            self.prefill_seconds_per_block_token += EMA_WEIGHT * (
                per_token - self.prefill_seconds_per_block_token
            )


@dataclass(slots=True)
class Engine:
    """The compute of a serving node.

    span: the blocks; compute: the torch thread; rates: measured by `measure_rates` at start, then
    kept up by what is served.
    """

    span: Span
    compute: ComputeThread
    rates: Rates
    limits: Limits = field(default_factory=Limits)
    waiting: Counter[str] = field(default_factory=Counter)

    @property
    def queue_length(self) -> int:
        """Steps waiting or running."""
        return self.waiting.total()

    async def step(
        self, peer: str, contract: Contract, cache: SpanCache, decision: Compute, body: Buffer, *, whole: bool
    ) -> Answer:
        """Compute one step: `body` in the contract's codec in, the same out.

        whole: answer with all positions, not only with those that the step wants back.
        Raises TooManyStreams (nothing was done), BadResult (what came in is not finite; nothing was
        done), NotFinite.
        """
        with self._place_in_queue(peer):
            answer, seconds = await self.compute.run(
                _compute_step, self.span, contract, cache, decision, body, whole
            )
        tokens = contract.batch * decision.what.tokens
        self.rates.observe(tokens, contract.stop - contract.start, seconds)
        return Answer(answer, int(seconds * 1e6))

    @contextmanager
    def _place_in_queue(self, peer: str) -> Iterator[None]:
        if self.queue_length >= self.limits.max_waiting_steps:
            raise TooManyStreams(f"{self.queue_length} steps wait for compute here", 1.0)
        if self.waiting[peer] >= self.limits.max_waiting_steps_per_peer:
            raise TooManyStreams(f"{self.waiting[peer]} steps of yours wait for compute here", 1.0)
        self.waiting[peer] += 1
        try:
            yield
        finally:
            self.waiting[peer] -= 1
            if not self.waiting[peer]:
                del self.waiting[peer]


def _compute_step(
    span: Span, contract: Contract, cache: SpanCache, decision: Compute, body: Buffer, whole: bool
) -> tuple[Buffer, float]:
    """Runs in the torch thread: decode, cut, forward, encode.  Returns the bytes and the seconds."""
    began = time.perf_counter()
    hidden = decode_hidden(body, contract)
    position = decision.what.position
    if cache.length > position:  # a cut, or what a cancelled step left behind
        cache.cut(position)
    hidden = span.forward(hidden, cache, position, contract.start, contract.stop)
    wanted = decision.what.tokens if whole else decision.what.reply_tokens
    encoded: Buffer = b""
    if wanted:
        try:
            encoded = encode_hidden(hidden[:, hidden.shape[1] - wanted :], contract.codec)
        except BadResult as bad:
            raise NotFinite(str(bad)) from None
    return encoded, time.perf_counter() - began


def measure_rates(span: Span, prefill_tokens: int = 64, seconds: float = 0.4) -> Rates:
    """Time decode steps and a prefill on zeros, for about `seconds`.  Runs in the torch thread."""
    import torch

    blocks = span.stop - span.start
    cache = span.new_cache(1, prefill_tokens)

    def timed(tokens: int, position: int) -> float:
        hidden = torch.zeros(1, tokens, span.hidden_size)
        began = time.perf_counter()
        span.forward(hidden, cache, position, span.start, span.stop)
        return time.perf_counter() - began

    timed(prefill_tokens // 2, 0)  # the first call pays for lazy set-up
    cache = span.new_cache(1, prefill_tokens)
    prefill = timed(prefill_tokens // 2, 0)
    decode: list[float] = []
    until = time.perf_counter() + seconds
    while len(decode) < prefill_tokens // 2 and (len(decode) < 3 or time.perf_counter() < until):
        decode.append(timed(1, prefill_tokens // 2 + len(decode)))
    return Rates(sorted(decode)[len(decode) // 2] / blocks, prefill / blocks / (prefill_tokens // 2))
