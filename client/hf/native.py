"""`generate` by the client's own loop, where every option of a call is one that it has.

The loop of `Swarm.generate` runs in the swarm's event loop, a token without a crossing of threads.  Its
filters are the library's own, in the library's order, and it draws from torch's global generator as the
library does.  So the tokens are the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from client.generation.generation_config import GenerationDefaults, defaults_of, settle
from client.generation.options import GenerateOptions
from client.hf.cache import RemoteCache, check_adapter

if TYPE_CHECKING:
    from client.generation.generate import Token
    from client.generation.generation_config import Settings
    from client.hf.access import SwarmAccess

# Fields of a GenerationConfig that the library's loop alone follows.
_LIBRARY = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "max_time",
    "stop_strings",
    "token_healing",
    "watermarking_config",
    "assistant_early_exit",
    "constraints",
    "force_words_ids",
    "cache_implementation",
    "prefill_chunk_size",
    "is_assistant",
    "use_mtp",
)


def settings_for(
    config: Any,  # Any: the library's GenerationConfig is untyped
    *,
    prompt_tokens: int,
    new_tokens: int,
    vocabulary: int,
    logits_processor: Any = None,  # Any: a caller's
    assistant: Any = None,  # Any: a model of the library
) -> Settings | None:
    """The settings of the client's own loop for a call's final config; None where the library's must run.

    assistant: `assistant_model`.  It and `prompt_lookup_num_tokens` are for speed alone where the likeliest
    tokens are taken; the library's loop draws other numbers with them than without.
    """
    is_assisted = assistant is not None or bool(config.prompt_lookup_num_tokens)
    if is_assisted and (config.do_sample or config.assistant_ensemble_weight is not None):
        return None
    if config.num_beams not in (None, 1) or config.num_return_sequences not in (None, 1):
        return None
    if config.use_cache is False or any(getattr(config, name, None) for name in _LIBRARY):
        return None
    try:
        if defaults_of(config, vocabulary).unsupported:
            return None
        settings = settle(
            GenerateOptions(
                max_new_tokens=new_tokens,
                generation_config=config,
                logits_processor=logits_processor or None,
                speculate="lookup" if is_assisted and assistant is None else assistant,
            ),
            GenerationDefaults(),
            tokenizer=None,
            vocabulary=vocabulary,
            prompt_tokens=prompt_tokens,
            room=new_tokens,
        )
    except ValueError:  # the library says in its own words what it does not take
        return None
    ends = config.eos_token_id  # None: no token ends the text
    eos_ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return replace(settings, eos_ids=frozenset(eos_ids))


class NativeRun:
    """One call of `generate`: its tokens as they come, and its cache."""

    def __init__(self, swarm: SwarmAccess, cache: RemoteCache, settings: Settings) -> None:
        self._swarm = swarm
        self._cache = cache
        self._settings = settings

    def run(self, ids: list[int], streamer: Any = None) -> list[int]:  # Any: a streamer of the library
        """The new tokens after `ids`.  Raises NoChain, PeerFault, Refused, ValueError."""
        swarm, cache, found = self._swarm, self._cache, list[int]()
        own = swarm.renewed()
        check_adapter(cache)
        conversation = swarm.swarm.conversation(self._length(len(ids)), adapter=own)
        if (session := cache.single) is not None:  # a cache that has positions already
            conversation.adopt(session, ids[: cache.get_seq_length()])

        async def whole() -> None:
            async with aclosing(self._tokens(conversation, ids)) as tokens:
                async for token in tokens:
                    found.append(token.id)

        try:
            if streamer is None:
                swarm.call(whole)
            else:
                for token in swarm.calls.iterate(self._tokens(conversation, ids)):
                    found.append(token.id)
                    streamer.put(torch.tensor([token.id]))
                streamer.end()
        finally:
            if conversation.session is not None:
                cache.follow(conversation.session, len(conversation.tokens))
        return found

    def _length(self, prompt: int) -> int:
        wanted = prompt + self._settings.max_new_tokens
        return wanted if self._cache.max_length is None else max(wanted, self._cache.max_length)

    def _tokens(self, conversation: Any, ids: list[int]) -> AsyncGenerator[Token, None]:
        from client.generation.generate import Generation

        swarm = self._swarm.swarm
        generation = Generation(
            swarm.local_model,
            conversation,
            self._settings,
            generator=torch.default_generator,
            speculation=swarm.speculators.speculation(self._settings.speculate),
        )
        return generation.run(ids, close=False)


def is_drafter(model: Any, vocabulary: int) -> bool:  # Any: a caller's
    """Whether the client's own loop can have an `assistant_model` guess tokens."""
    config = getattr(model, "config", None)
    own = getattr(config, "vocab_size", None)
    # A model in a swarm would wait for the thread that calls it.
    is_unfit = getattr(config, "is_encoder_decoder", False) or hasattr(model, "swarm")
    return own == vocabulary and not is_unfit


def one_prompt(inputs: Mapping[str, Any]) -> list[int] | None:
    """The tokens of a call with one row of ids and no padding; None for any other call.

    inputs: what the call has besides options: input_ids, attention_mask.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        return None
    if mask is not None and not bool((mask == 1).all()):
        return None
    return [int(each) for each in ids[0]]
