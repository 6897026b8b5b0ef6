"""From logits to a token: pure, and the same for the same seed.

The filters are transformers' own, in the order in which its `generate` applies them, so that the
same settings and the same logits give the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # logits divided by less could overflow; the likeliest token is certain long before


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How the next token is chosen.

    temperature: None or 0 is greedy.  top_k, top_p: keep so many tokens, so much probability.
    repetition_penalty: above 1, tokens already there become less likely (arXiv:1909.05858); it
    counts for greedy too.  seed: for a generator of this generation's own; None draws one.
    Raises ValueError for a value outside its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}, 0 to 100 is allowed")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, at least 1 is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, above 0 and at most 1 is allowed")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, above 0 is allowed")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature is None or self.temperature < LEAST_TEMPERATURE

    @property
    def best_only(self) -> bool:
        """Whether only the place of the largest logit matters."""
        return self.greedy and self.repetition_penalty in (None, 1.0)


class Sampler:
    """Chooses tokens by `options`; its generator is its only state."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        self._filters = _filters(options)

    def pick(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """The next token after `tokens`, from logits float32 [vocabulary]."""
        if self._filters:
            ids = torch.tensor([tokens], dtype=torch.long)
            scores = logits[None]  # [1, vocabulary]
            for keep in self._filters:
                scores = keep(ids, scores)
            logits = scores[0]
        if self._options.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))


def _filters(options: SamplingOptions) -> list[Any]:  # Any: the library's processors are untyped
    if options.best_only:
        return []
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    filters: list[Any] = []
    if options.repetition_penalty not in (None, 1.0):
        filters.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature is not None and not options.greedy:
        if options.temperature != 1.0:
            filters.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k is not None:
            filters.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p < 1.0:
            filters.append(TopPLogitsWarper(options.top_p))
    return filters
