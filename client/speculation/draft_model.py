"""A small model at the client that guesses tokens (speculative decoding, arXiv:2211.17192), greedily.

It computes in the torch thread, next to the head.  Its cache of keys and values is cut after wrong guesses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from node.config import ConfigError
from node.model.embed_and_head import open_tokenizer
from node.runtime.compute_thread import Runner
from node.runtime.values import shown

PIECE = 256  # tokens of a prompt in one turn of the torch thread: heads of other generations come between
_SMOOTHING = 0.2


class DraftModel:
    """Guesses for one generation.

    Promises, checked by tests/model/test_draft_model.py:
      * the guesses are the model's own greedy tokens after the text, whatever was guessed in vain before;
      * no token of the text is computed twice.
    """

    def __init__(self, model: Any, compute: Runner) -> None:  # Any: a causal language model of transformers
        """model: see `check_model`; several generations may share it."""
        self.seconds = 0.0  # of one guess, as measured
        self._model = model
        self._compute = compute
        self._cache: Any = None  # Any: the library's cache
        self._cached: list[int] = []

    async def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` guesses of the tokens after `tokens`."""
        kept = 0
        while kept < min(len(self._cached), len(tokens) - 1) and self._cached[kept] == tokens[kept]:
            kept += 1
        new = list(tokens[kept:])
        await self._compute.run(self._cut, kept)
        while len(new) > PIECE:
            await self._compute.run(self._next, new[:PIECE])
            del new[:PIECE]
        return await self._compute.run(self._guess, new, most)

    def _guess(self, new: list[int], most: int) -> list[int]:
        """Runs in the torch thread."""
        began, found = time.perf_counter(), [self._next(new)]
        timed = most
        if len(new) > 2:  # the first guess has read a prompt besides
            began, timed = time.perf_counter(), most - 1
        while len(found) < most:
            found.append(self._next(found[-1:]))
        if timed:
            spent = (time.perf_counter() - began) / timed
            self.seconds += (spent - self.seconds) * (_SMOOTHING if self.seconds else 1.0)
        return found

    @torch.inference_mode()
    def _next(self, tokens: list[int]) -> int:
        """Runs in the torch thread: take these tokens in; the likeliest one after them."""
        ids = torch.tensor([tokens], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._cached += tokens
        return int(out.logits[0, -1].argmax())

    def _cut(self, kept: int) -> None:
        """Runs in the torch thread: forget what was cached behind `kept` tokens."""
        if kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))
            del self._cached[kept:]


def check_model(model: Any, vocabulary: int, name: str) -> None:
    """Raises ValueError where a draft model cannot guess tokens of the swarm's model.

    vocabulary, name: of the swarm's model.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "vocab_size", None)
    if own is None or not callable(model):
        raise ValueError(
            f"speculate is {shown(model)}: auto, lookup, off, a causal language model of transformers, or its"
            " folder or name is allowed"
        )
    if own != vocabulary:
        drafts = getattr(config, "name_or_path", "") or type(model).__name__
        raise ValueError(
            f"the draft model {drafts} has a vocabulary of {own} tokens, {name} one of {vocabulary}: both"
            " need one tokenizer"
        )
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"the draft model {type(model).__name__} keeps states that cannot go back")


def load_model(folder: Path, tokenizer: Any, vocabulary: int, name: str) -> Any:  # Any: of transformers
    """Read a draft model.  tokenizer, vocabulary, name: of the swarm's model.  Takes seconds.

    Raises ValueError where the two tokenizers differ, or the folder has no such model.
    """
    from transformers import AutoModelForCausalLM

    try:
        words, others = open_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    except (ConfigError, OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"the draft model in {folder} cannot be opened: {what}") from None
    if words != others:
        raise ValueError(
            f"the draft model {folder.name} has a vocabulary of {len(words)} tokens, {name} one of"
            f" {len(others)}, and they are not the same: both need one tokenizer"
        )
    check_model(model, vocabulary, name)
    return model.eval()
