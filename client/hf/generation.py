"""`generate` of a model in a swarm: the library's, on the servers' caches, or the client's own loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from client.adapters.prompts import Prompts
from client.hf.access import SwarmAccess
from client.hf.blocks import RemoteSequential
from client.hf.cache import CURRENT, RemoteCache
from client.hf.native import NativeRun, is_drafter, one_prompt, settings_for

if TYPE_CHECKING:
    from client.hf.blocks import InferenceSession

SLACK = 64  # positions of a session beyond those that a call asks for: virtual tokens of an adapter in front
# Methods that adapters (peft) replace at an object.
_REPLACED = ("forward", "generate", "prepare_inputs_for_generation")
_MADE: ContextVar[list[RemoteCache] | None] = ContextVar("caches that a generate has made", default=None)


class RemoteGeneration:
    """Mixed into the library's causal language model: caches at the servers, and calls that know them.

    swarm, blocks: of the model.
    """

    swarm: SwarmAccess
    blocks: RemoteSequential

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        session: InferenceSession | None = None,
        **arguments: Any,
    ) -> Any:
        """The library's `generate`, with all its arguments.

        session: of `inference_session`: the call continues its text and answers the new tokens after the
        given ones, as Petals does; `generate(None, session=session)` goes on without new tokens.
        Where every option is one that the client's own loop has, that loop runs: the tokens are the same.
        Raises ValueError for options that need keys and values here; NoChain, PeerFault, Refused.
        """
        active = session or self.blocks.active_session
        if active is not None:
            return self._continue(active, inputs, generation_config, arguments)
        with _made() as made:
            found = self._natively(inputs, generation_config, arguments)
            if found is None:
                found = super().generate(  # type: ignore[misc]  # the library's class
                    inputs, generation_config, **arguments
                )
            kept = getattr(found, "past_key_values", None)
            made[:] = [cache for cache in made if cache is not kept]
        return found

    def inference_session(self, max_length: int | None = None, *, batch_size: int = 1) -> Any:
        """A session in use within the context: see `RemoteSequential.inference_session`."""
        return self.blocks.inference_session(max_length, batch=batch_size)

    def use_session(self, session: InferenceSession | None) -> Any:
        """Use a session that exists within the context."""
        return self.blocks.use_session(session)

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the innermost context."""
        return self.blocks.active_session

    def _continue(
        self, session: InferenceSession, inputs: Any, generation_config: Any, arguments: dict[str, Any]
    ) -> Any:
        """Petals' way: the text so far is the session's."""
        given = inputs if inputs is not None else arguments.pop("input_ids", None)
        before = session.output_ids
        if given is None and before is None:
            raise ValueError("generate() without tokens: the session has none yet")
        parts = [each for each in (before, given) if each is not None]
        whole = torch.cat([each.to(parts[0].device) for each in parts], dim=1)
        new = arguments.get("max_new_tokens")
        if new is not None and whole.shape[1] + int(new) > session.max_length:
            raise ValueError(
                f"{whole.shape[1]} tokens and {new} new ones: the session has {session.max_length} positions"
            )
        arguments["past_key_values"] = session.open_cache()
        with self.blocks.without_session():
            found = self.generate(whole, generation_config, **arguments)
        ids = found if isinstance(found, Tensor) else found.sequences
        session.note(ids)
        answer = ids[:, 0 if before is None else before.shape[1] :]
        if isinstance(found, Tensor):
            return answer
        found["sequences"] = answer
        return found

    def _natively(self, inputs: Any, generation_config: Any, arguments: dict[str, Any]) -> Any:
        """The answer by the client's own loop; None where the library's must run."""
        given = dict(arguments)
        streamer, processors = given.pop("streamer", None), given.pop("logits_processor", None)
        cache = given.get("past_key_values")
        if given.pop("stopping_criteria", None) or not self._is_plain(cache):
            return None
        assistant = given.pop("assistant_model", None)
        for name in ("assistant_tokenizer", "prefix_allowed_tokens_fn", "custom_generate", "synced_gpus",
                     "negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer"):  # fmt: skip
            if given.pop(name, None):
                return None
        model = cast(Any, self)
        if assistant is not None and not is_drafter(assistant, model.config.vocab_size):
            return None
        config, others = model._prepare_generation_config(generation_config, **given)
        if inputs is not None:
            others["input_ids"] = inputs
        ids = one_prompt(others)
        if ids is None or set(others) - {"input_ids", "attention_mask", "past_key_values"}:
            return None
        new = _new_tokens(model, config, generation_config, given, others["input_ids"])
        if new is None:
            return None
        settings = settings_for(
            config,
            prompt_tokens=len(ids),
            new_tokens=new,
            vocabulary=model.config.vocab_size,
            logits_processor=list(processors) if processors else None,
            assistant=assistant,
        )
        if settings is None:
            return None
        if cache is None:
            cache = self._new_cache(len(ids) + new)
        if streamer is not None:
            streamer.put(others["input_ids"].cpu())
        tokens = NativeRun(self.swarm, cache, settings).run(ids, streamer)
        device = others["input_ids"].device
        sequences = torch.tensor([ids + tokens], dtype=torch.long, device=device)
        if not config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    @property
    def _prompts(self) -> Any:
        """What prompt tuning trains; None without it."""
        return next((each for each in cast(nn.Module, self).modules() if isinstance(each, Prompts)), None)

    def _is_plain(self, cache: Any) -> bool:
        """Whether the client's own loop computes what this model does: nothing here was changed."""
        model = cast(Any, self)
        ends = self.swarm.swarm.local_model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        theirs = cast(Any, ends.model)
        if cache is not None and not isinstance(cache, RemoteCache):
            return False
        if cache is not None and cache.is_initialized and cache.single is None:
            return False
        if any(name in vars(model) for name in _REPLACED) or self.swarm.is_at_ends:
            return False
        changed = [module._forward_hooks or module._forward_pre_hooks for module in (model, model.base_model)]
        return (
            self._prompts is None
            and _same(head, theirs.get_output_embeddings())
            and _same(embedding, theirs.get_input_embeddings())
            and not any(changed)
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by the library's `generate`: give it a RemoteCache.  Raises ValueError, TypeError."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: keys and values are at the"
                " servers; leave it out"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if not isinstance(given, RemoteCache):
                raise TypeError(
                    f"past_key_values is a {type(given).__name__}, client.hf.RemoteCache is needed"
                )
            given.keep()
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_cache(max_cache_length + 1)
        CURRENT.set(model_kwargs.get("past_key_values"))

    def _new_cache(self, positions: int) -> RemoteCache:
        """A cache of this call: positions, and SLACK as far as the model goes."""
        longest = self.swarm.swarm.info.max_position
        cache = RemoteCache(self.swarm, max(positions, min(positions + SLACK, longest)))
        if (made := _MADE.get()) is not None:
            made.append(cache)
        return cache


@contextmanager
def _made() -> Iterator[list[RemoteCache]]:
    """The caches that are made within; those left in the list are closed at the end."""
    made: list[RemoteCache] = []
    token, current = _MADE.set(made), CURRENT.set(None)
    try:
        yield made
    finally:
        _MADE.reset(token)
        CURRENT.reset(current)
        for cache in made:
            cache.close()


def _same(mine: nn.Module | None, theirs: nn.Module | None) -> bool:
    """Whether a module of the model is the client's own, untouched."""
    if mine is None or theirs is None or mine._forward_hooks or mine._forward_pre_hooks:
        return False
    ours, others = getattr(mine, "weight", None), getattr(theirs, "weight", None)
    return (
        isinstance(ours, Tensor)
        and isinstance(others, Tensor)
        and isinstance(mine, type(theirs))
        and ours.data_ptr() == others.data_ptr()
        and ours.dtype == others.dtype
        and ours._version == getattr(mine, "_loaded", ours._version)
    )


def _new_tokens(
    model: Any, config: Any, generation_config: Any, given: dict[str, Any], input_ids: Tensor
) -> int | None:
    """The number of new tokens of a call, by the library's own rules; None for a call that it refuses."""
    own = (generation_config, model.generation_config)
    settled = model._prepare_generated_length(
        generation_config=copy.copy(config),
        has_default_max_length=given.get("max_length") is None
        and all(getattr(each, "max_length", None) is None for each in own),
        has_default_min_length=given.get("min_length") is None
        and all(getattr(each, "min_length", None) is None for each in own),
        model_input_name="input_ids",
        inputs_tensor=input_ids,
        input_ids_length=input_ids.shape[1],
    )
    new = int(settled.max_length) - input_ids.shape[1]
    return new if new > 0 else None
