"""The forward of a base model whose blocks are at the servers, for every supported architecture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from client.adapters.prompts import Prompts
from client.hf.access import SwarmAccess
from client.hf.blocks import RemoteSequential
from client.hf.cache import CURRENT, RemoteCache
from client.hf.layers import CALL, Call
from client.hf.padding import check_cached, check_positions, padding_of, positions
from client.hf.training import RemoteSaving
from node.model.checkpoint.architecture import Architecture

# The library gives padding positions too, where a call names none.
COUNTING_PADDING = frozenset({"gpt2"})
LAST_ONLY: ContextVar[bool] = ContextVar("the last position alone is wanted", default=False)


@dataclass
class RemoteOutput(ModelOutput):  # type: ignore[misc]  # the library's class is untyped
    """What the library's base models answer, of all kinds: its heads read the fields that they know."""

    last_hidden_state: Tensor | None = None
    past_key_values: RemoteCache | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class RemoteBase(RemoteSaving):
    """Mixed into the library's base model by `client.hf.model`: embedding and norm are here, blocks are not.

    swarm, remote: of the model, its blocks.  prompts: what prompt tuning trains; None without it.
    """

    swarm: SwarmAccess
    remote: RemoteSequential
    architecture: Architecture
    prompts: Prompts | None

    def forward(self, *args: Any, **arguments: Any) -> Any:
        """The library's arguments and output; see `client.hf` for those that cannot be.

        Raises ValueError and TypeError for a mask, positions, a cache or an output that the servers do not
        have; NoChain, PeerFault, Refused.
        """
        given = _by_name(type(self), args, arguments)
        return_dict = given.pop("return_dict", None)
        wanted = self._wanted_states(given)
        _refuse_outputs(given, self._config)
        embeds = self._embeds(given.pop("input_ids", None), given.pop("inputs_embeds", None))
        rows, tokens = embeds.shape[:2]
        cache = self._cache(given.pop("past_key_values", None), given.pop("use_cache", None))
        seen = 0 if cache is None else cache.get_seq_length()
        mask, position_ids = given.pop("attention_mask", None), given.pop("position_ids", None)
        pads = padding_of(mask, rows, seen, tokens)
        if cache is not None:
            check_cached(mask)
            cache.pad(pads)
        check_positions(position_ids, pads, rows, seen, tokens)
        call = self._call(cache, pads, tokens, wanted)
        if call.prefix and self.prompts is not None:
            soft = self.prompts.soft.to(embeds.device, embeds.dtype)
            embeds = torch.cat([soft.expand(rows, -1, -1), embeds], dim=1)
        counted = position_ids is None and self.architecture.model_type in COUNTING_PADDING
        last = self._through(call, embeds, seen, given, None if counted else pads)
        hidden_states = None
        if wanted is not None:
            states: list[Tensor | None] = [call.states.get(at) for at in range(self.swarm.blocks + 1)]
            if states[-1] is not None:
                states[-1] = last  # after the norm, as the library has it
            hidden_states = tuple(each if at in wanted else None for at, each in enumerate(states))
        output = RemoteOutput(last_hidden_state=last, past_key_values=cache, hidden_states=hidden_states)
        return output.to_tuple() if return_dict is False else output

    @property
    def _config(self) -> Any:  # Any, here and below: the library's own types
        return cast(Any, self).config

    def _embeds(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        return cast(Tensor, cast(Any, self).get_input_embeddings()(input_ids))

    def _cache(self, given: Any, use_cache: bool | None) -> RemoteCache | None:
        session = self.remote.active_session
        if given is None and session is None and use_cache and (current := CURRENT.get()) is not None:
            return current.successor()
        if given is None:
            return session.open_cache() if session is not None and use_cache is not False else None
        if not isinstance(given, RemoteCache):
            raise TypeError(
                f"past_key_values is a {type(given).__name__}, client.hf.RemoteCache is needed: keys and"
                " values are at the servers"
            )
        return given

    def _call(
        self, cache: RemoteCache | None, pads: Tensor | None, tokens: int, wanted: Sequence[int] | None
    ) -> Call:
        prompts, prefix = self.prompts, 0
        if prompts is not None:
            prefix = prompts.length if cache is None or not cache.get_seq_length() else 0
            if cache is not None:
                cache.prepare(prompts)
        deep = None if prompts is None or cache is not None else prompts.deep
        return Call(
            self.swarm, cache, pads, prefix, tokens, LAST_ONLY.get() and cache is not None, wanted or (), deep
        )

    def _through(
        self, call: Call, embeds: Tensor, seen: int, others: dict[str, Any], pads: Tensor | None
    ) -> Tensor:
        """Everything between the embedding and the head, [rows, tokens or 1, hidden].

        pads: of the positions that the library adds to the embedding.
        """
        container = cast(nn.Module, self)
        if self.architecture.plain_ends:
            norm = container.get_submodule(self.architecture.ends[1])
            return cast(Tensor, norm(call.run(embeds)))
        rows, length = embeds.shape[:2]
        behind = 0 if self.prompts is None else self.prompts.length
        places = positions(pads, rows, seen + behind - call.prefix, length)
        if pads is not None and call.prefix:
            places[:, : call.prefix] = torch.arange(call.prefix)
        # A mask of four dimensions is taken as it is: the library builds none.
        alibi = self.architecture.merge == "padding"
        stand_in = None if alibi else torch.empty(rows, 1, 0, 0, device=embeds.device)
        token = CALL.set(call)
        try:
            output = super().forward(  # type: ignore[misc]  # the library's class, mixed in
                inputs_embeds=embeds,
                attention_mask=stand_in,
                position_ids=places.clamp(min=0).to(embeds.device),
                use_cache=False,
                **others,
            )
        finally:
            CALL.reset(token)
        answered = call.states[self.swarm.blocks].shape[1]
        return cast(Tensor, output.last_hidden_state[:, -answered:])

    def _wanted_states(self, given: dict[str, Any]) -> list[int] | None:
        """The hidden states that the caller asks for, from 0 (the embedding); None for none."""
        asked = given.pop("output_hidden_states", None)
        asked = getattr(self._config, "output_hidden_states", False) if asked is None else asked
        number = self.swarm.blocks + 1
        if asked is True:
            return list(range(number))
        if asked is False or asked is None:
            return None
        chosen = [asked] if isinstance(asked, int) else list(asked)
        return sorted({each % number for each in chosen if -number <= each < number})


def _by_name(cls: type, args: Sequence[Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a library's forward by their names."""
    if not args:
        return dict(arguments)
    names = list(inspect.signature(cast(Any, cls).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **arguments}


def _refuse_outputs(given: dict[str, Any], config: Any) -> None:
    """Raises ValueError for outputs that never leave the servers."""
    for name in ("output_attentions", "output_router_logits"):
        asked = given.pop(name, None)
        if asked or (asked is None and getattr(config, name, False)):
            raise ValueError(f"{name}: they stay at the servers; output_hidden_states is allowed")
