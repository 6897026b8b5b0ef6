"""How likely tokens were, in OpenAI's two shapes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from client.gateway.openai.errors import unsupported

if TYPE_CHECKING:
    from client.adapters.upload import AnyAdapter
    from client.api import SwarmLike
    from client.generation.generate import Token

LEAST = -9999.0  # JSON has no -inf; vLLM's number
_BYTE = re.compile(r"<0x([0-9a-fA-F]{2})>")
MAX_CACHED = 1 << 16
HEAD_POSITIONS = 64  # of a prompt at a time: their logits take 4 bytes for each token of the vocabulary


class TokenTexts:
    """The text and the bytes of single tokens."""

    def __init__(self, tokenizer: Any) -> None:  # Any: of transformers, untyped
        self._tokenizer = tokenizer
        self._byte_level = is_byte_level(tokenizer)
        self.text = lru_cache(MAX_CACHED)(self._text)
        self.bytes = lru_cache(MAX_CACHED)(self._bytes)

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _bytes(self, token: int) -> list[int]:
        """The token's own bytes, also where they are a part of a character alone."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str):
            if found := _BYTE.fullmatch(piece):
                return [int(found[1], 16)]
            if self._byte_level and all(character in _BYTE_OF for character in piece):
                return [_BYTE_OF[character] for character in piece]
        return list(self.text(token).encode())

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        """One token of a chat's log probabilities."""
        return {"token": self.text(token), "logprob": _finite(logprob), "bytes": self.bytes(token)}


def chat_entry(texts: TokenTexts, token: Token) -> dict[str, Any]:
    """An item of `choices[].logprobs.content`."""
    top = [texts.entry(each, logprob) for each, logprob in (token.top_logprobs or {}).items()]
    return {**texts.entry(token.id, token.logprob or 0.0), "top_logprobs": top}


async def prompt_logprobs(
    swarm: SwarmLike, adapter: AnyAdapter | None, ids: list[int], count: int
) -> list[tuple[float, dict[int, float]]]:
    """How likely each token of a prompt but the first was after those before it, and the `count` likeliest.

    One `forward` of the prompt through the swarm, without a session.  Raises ValueError, NoChain, PeerFault,
    Refused; RequestError for a model whose ends belong to one thread.
    """
    import torch

    ends = swarm.local_model
    if not ends.stateless:
        raise unsupported("logprobs", "not with echo for models of this architecture")
    if len(ids) < 2:
        return []
    embedded = await asyncio.to_thread(ends.embed, torch.tensor([ids]), 0)
    hidden = await swarm.forward(embedded, adapter=adapter)

    def likely() -> list[tuple[float, dict[int, float]]]:
        found = []
        for first in range(0, len(ids) - 1, HEAD_POSITIONS):
            part = hidden[:, first : min(first + HEAD_POSITIONS, len(ids) - 1)]
            logprobs = ends.head(part)[0].log_softmax(-1)  # [tokens, vocabulary]
            best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
            for row, token in enumerate(ids[first + 1 : first + 1 + len(logprobs)]):
                top = dict(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
                found.append((float(logprobs[row, token]), top))
        return found

    return await asyncio.to_thread(likely)


@dataclass(slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of completions.  offset: characters before the next token."""

    texts: TokenTexts
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[Mapping[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: int, logprob: float | None, top: Mapping[int, float] | None) -> None:
        """A token more.  None: the first of all, which nothing came before."""
        text = self.texts.text(token)
        self.tokens.append(text)
        self.token_logprobs.append(None if logprob is None else _finite(logprob))
        self.top_logprobs.append(
            None if top is None else {self.texts.text(each): _finite(value) for each, value in top.items()}
        )
        self.text_offset.append(self.offset)
        self.offset += len(text)

    def take(self) -> dict[str, Any]:
        """The tokens since the last call, as OpenAI has them."""
        made = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return made


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST


def is_byte_level(tokenizer: Any) -> bool:  # Any: of transformers, untyped
    """Whether every byte has a token, as in GPT-2's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in repr(getattr(backend, "decoder", None))


def _byte_characters() -> dict[str, int]:
    """The bytes of GPT-2's alphabet, in which every byte is a visible character."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
