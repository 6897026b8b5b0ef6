"""Between texts and tokens, in a thread of its own: chat templates, prompts, the texts of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from client.gateway.formats.chat import ChatFormats
from client.gateway.openai.errors import RequestError, invalid
from client.gateway.openai.logprobs import TokenTexts, is_byte_level
from client.generation.checks import check_vocabulary
from node.model.embed_and_head import EmbedAndHead

T = TypeVar("T")

COMPOSED = 4  # characters that a normalizer makes one of, at most


class Language:
    """The tokenizer of a gateway's model.

    One thread works for all requests, so that the event loop goes on while it reads a long prompt, and so
    that callers with long prompts wait for each other; a second one does what may take longer.
    """

    def __init__(self, ends: EmbedAndHead, vocabulary: int) -> None:
        """ends: the client's part of the model.  vocabulary: tokens that its head knows."""
        self.tokenizer: Any = ends.tokenizer  # Any: of transformers, untyped
        self.vocabulary = vocabulary
        self.formats = ChatFormats(self.tokenizer, vocabulary=vocabulary, end_ids=ends.eos_ids)
        self.texts = TokenTexts(self.tokenizer)
        self._longest_piece = _longest_piece(self.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raceme-language")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="raceme-grammars")

    async def run(self, function: Callable[[], T], *, slow: bool = False) -> T:
        """The result of a function of the tokenizer.

        slow: it compiles a grammar, which may take a second: others do not wait for it.
        """
        thread = self._slow if slow else self._thread
        return await asyncio.get_running_loop().run_in_executor(thread, function)

    def check_length(self, characters: int, longest: int, param: str) -> None:
        """Raise RequestError for a text that is too long by the number of its characters already."""
        if self._longest_piece and characters // self._longest_piece >= longest:
            raise RequestError(
                400,
                f"This model's maximum context length is {longest} tokens. However, your {param} has"
                f" {characters} characters, {characters // self._longest_piece} tokens at least. Please"
                f" reduce the length of the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def tokens_of(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text.  special: with those that the model puts in front."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def text_of(self, tokens: list[int]) -> str:
        """The text of tokens.  Raises RequestError for tokens that the model does not have."""
        try:
            check_vocabulary(tokens, self.vocabulary)
        except ValueError as error:
            raise invalid(str(error), "tokens") from None
        return str(self.tokenizer.decode(tokens)) if tokens else ""

    def close(self) -> None:
        """End the threads."""
        for thread in (self._thread, self._slow):
            thread.shutdown(wait=False, cancel_futures=True)


def _longest_piece(tokenizer: Any) -> int:
    """Characters of the longest token; 0 where a token may stand for any text."""
    if not is_byte_level(tokenizer):
        return 0  # the unknown token may stand for any number of characters
    return COMPOSED * max(map(len, tokenizer.get_vocab()), default=0)
