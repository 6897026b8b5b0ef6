"""From logits to a token: pure; a seed decides the tokens.

The filters are transformers' own, in the order of its `generate`, so that settings and logits give
the distribution of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from client.generation.options import SamplingOptions


class Choice(NamedTuple):
    """A token.  logprob, top_logprobs: where they were asked for, see `client.generation.generate.Token`."""

    token: int
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


class Sampler:
    """Chooses tokens by `options`; its state is its generator and the caller's processors."""

    def __init__(
        self,
        options: SamplingOptions,
        *,
        end_ids: Iterable[int] = (),
        prompt_tokens: int = 0,
        max_length: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """end_ids: tokens that end a generation.  max_length: of prompt and text, in tokens.

        generator: of random numbers; None: one of its own, by the options' seed.
        """
        self._options = options
        self._generator = _seeded(options.seed) if generator is None else generator
        self._filters: list[Any] = []  # Any: the library's processors are untyped
        if not options.best_only:
            self._filters = _filters(options, sorted(end_ids), prompt_tokens, max_length)

    def pick(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """The next token after `tokens`, from logits float32 [vocabulary].

        Raises ValueError where the options leave no token, or a caller's processor returns no scores.
        """
        if self._filters:
            logits = self._filtered(logits, tokens)
        if self._options.greedy:
            best = int(logits.argmax())
            if self._filters and logits[best] == -torch.inf:
                raise ValueError("the options forbid every token")
            return best
        probabilities = logits.softmax(-1)
        if self._filters and bool(probabilities.isnan().any()):
            raise ValueError("the options forbid every token, or make logits that are no numbers")
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> Choice:
        """As `pick`, with log probabilities where the options ask for them."""
        if not self._options.wants_logprobs:
            return Choice(self.pick(logits, tokens))
        raw = logits.log_softmax(-1)
        token = self.pick(logits, tokens)
        best = raw.topk(min(self._options.top_logprobs or 0, len(raw)))
        top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Choice(token, float(raw[token]), top)

    def _filtered(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], dtype=torch.long)
        # A caller's processor may write into its argument, and others read this memory.
        scores = logits[None].clone() if self._options.logits_processor else logits[None]  # [1, vocabulary]
        shape = scores.shape
        for keep in self._filters:
            scores = keep(ids, scores)
            if not isinstance(scores, Tensor) or scores.shape != shape or not scores.is_floating_point():
                found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
                raise ValueError(
                    f"{type(keep).__name__} in logits_processor returned {found[:60]},"
                    f" scores {list(shape)} are needed"
                )
        return scores[0]


def _seeded(seed: int | None) -> torch.Generator:
    """A generator; None: by chance."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class OutputPenalty:
    """Presence and frequency penalties over generated tokens, as OpenAI and vLLM define them.

    logit - frequency * times that the token was generated - presence * whether it was.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids int64 [1, tokens], scores float32 [1, vocabulary] -> float32 [1, vocabulary]."""
        counts = torch.bincount(ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def _filters(
    options: SamplingOptions, end_ids: list[int], prompt_tokens: int, max_length: int | None
) -> list[Any]:  # Any: the library's processors are untyped
    """In the order of transformers' `generate`; each option of others follows the most similar one."""
    mine = list(options.logits_processor or ())
    filters: list[Any] = []
    # A processor of the caller's takes the place of our own of its type, as in transformers.
    for own in (
        *_biases(options, prompt_tokens, end_ids),
        *_lengths(options, end_ids, prompt_tokens, max_length),
    ):
        theirs = next((one for one in mine if type(one) is type(own)), own)
        filters.append(theirs)
    filters += [one for one in mine if not any(one is other for other in filters)]
    if not options.greedy:
        filters += _warpers(options)
    if options.renormalize_logits:
        from transformers.generation.logits_process import LogitNormalization

        filters.append(LogitNormalization())
    return filters


def _biases(options: SamplingOptions, prompt_tokens: int, end_ids: list[int]) -> list[Any]:
    from transformers.generation import logits_process as library

    found: list[Any] = []
    if options.sequence_bias:
        found.append(library.SequenceBiasLogitsProcessor(dict(options.sequence_bias)))
    if options.logit_bias:
        biases = {(token,): bias for token, bias in options.logit_bias}
        found.append(library.SequenceBiasLogitsProcessor(biases))
    if options.repetition_penalty not in (None, 1.0):
        found.append(library.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        presence, frequency = options.presence_penalty or 0.0, options.frequency_penalty or 0.0
        found.append(OutputPenalty(presence, frequency, prompt_tokens))
    if options.no_repeat_ngram_size:
        found.append(library.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    # The library leaves out words that are an end token, and raises where no word is left.
    if words := [
        list(word) for word in options.bad_words_ids or () if word not in [(end,) for end in end_ids]
    ]:
        found.append(library.NoBadWordsLogitsProcessor(words, torch.tensor(end_ids) if end_ids else None))
    return found


def _lengths(
    options: SamplingOptions, end_ids: list[int], prompt_tokens: int, max_length: int | None
) -> list[Any]:
    """The filters that depend on the text's length, and tokens that are forbidden or forced at a place."""
    from transformers.generation import logits_process as library

    found: list[Any] = []
    stops = sorted({*end_ids, *(options.stop_token_ids or ())})
    if options.min_new_tokens and stops:
        found.append(
            library.MinNewTokensLengthLogitsProcessor(
                prompt_tokens, options.min_new_tokens, torch.tensor(stops)
            )
        )
    elif options.min_new_tokens is None and options.min_length and stops:
        found.append(library.MinLengthLogitsProcessor(options.min_length, torch.tensor(stops)))
    if options.forced_bos_token_id is not None:
        found.append(library.ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id))
    if options.forced_eos_token_id and max_length is not None:
        found.append(library.ForcedEOSTokenLogitsProcessor(max_length, list(options.forced_eos_token_id)))
    if options.remove_invalid_values:
        found.append(library.InfNanRemoveLogitsProcessor())
    if options.exponential_decay_length_penalty and end_ids:
        found.append(
            library.ExponentialDecayLengthPenalty(
                options.exponential_decay_length_penalty, torch.tensor(end_ids), prompt_tokens
            )
        )
    if options.suppress_tokens:
        found.append(library.SuppressTokensLogitsProcessor(list(options.suppress_tokens)))
    if options.begin_suppress_tokens:
        begin = prompt_tokens + (prompt_tokens <= 1 and options.forced_bos_token_id is not None)
        found.append(library.SuppressTokensAtBeginLogitsProcessor(list(options.begin_suppress_tokens), begin))
    return found


def _warpers(options: SamplingOptions) -> list[Any]:
    """The filters that transformers applies only where it samples."""
    from transformers.generation import logits_process as library

    found: list[Any] = []
    if options.temperature != 1.0:
        found.append(library.TemperatureLogitsWarper(options.temperature))
    if options.top_h is not None:
        found.append(library.TopHLogitsWarper(options.top_h))
    if options.top_k:
        found.append(library.TopKLogitsWarper(options.top_k))
    if options.top_p is not None and options.top_p < 1.0:
        found.append(library.TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        found.append(library.MinPLogitsWarper(options.min_p))
    if options.typical_p is not None and options.typical_p < 1.0:
        found.append(library.TypicalLogitsWarper(options.typical_p))
    if options.epsilon_cutoff and options.epsilon_cutoff < 1.0:
        found.append(library.EpsilonLogitsWarper(options.epsilon_cutoff))
    if options.eta_cutoff and options.eta_cutoff < 1.0:
        found.append(library.EtaLogitsWarper(options.eta_cutoff, device="cpu"))
    return found
