"""From the option `speculate` to the guesses of one generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from client.speculation.speculation import Crowd, Drafter, Speculation
from client.speculation.width import WidthPolicy
from node.runtime.compute_thread import Runner


@dataclass(slots=True)
class Speculators:
    """Makes the guesses of all generations of one client.

    tokenizer, vocabulary, name: of the swarm's model.
    find_folder: of a model that is named; runs in a thread.  Raises ValueError.
    """

    tokenizer: Callable[[], Any]  # Any: the library's tokenizers are not typed
    vocabulary: int
    name: str
    compute: Runner
    find_folder: Callable[[str], Path]
    _crowd: Crowd = field(default_factory=Crowd)
    _loaded: dict[str, Any] = field(default_factory=dict)  # Any: models of transformers, by their names

    def speculation(self, speculate: Any) -> Speculation | None:  # Any: a model of transformers, or a word
        """The guesses of one generation; None: none are made.

        speculate: see `GenerateOptions`.  Raises ValueError for a model with another vocabulary.
        """
        if speculate is None or (isinstance(speculate, str) and speculate == "off"):
            return None
        if isinstance(speculate, str) and speculate in ("auto", "lookup"):
            is_asked = speculate == "lookup"
            return Speculation(WidthPolicy(guarded=not is_asked), self._crowd, is_asked=is_asked)
        if isinstance(speculate, str):
            load = partial(self._load, speculate)
            return Speculation(WidthPolicy(guarded=False), self._crowd, load=load, is_asked=True)
        from client.speculation.draft_model import DraftModel, check_model

        check_model(speculate, self.vocabulary, self.name)
        drafter = DraftModel(speculate, self.compute)
        return Speculation(WidthPolicy(guarded=False), self._crowd, drafter, is_asked=True)

    async def _load(self, named: str) -> Drafter:
        """The model of a folder or a name, read at its first use.  Raises ValueError, ConfigError."""
        from client.speculation.draft_model import DraftModel, load_model

        if (model := self._loaded.get(named)) is None:

            def load() -> Any:
                return load_model(self.find_folder(named), self.tokenizer(), self.vocabulary, self.name)

            model = self._loaded[named] = await trio.to_thread.run_sync(load)
        return DraftModel(model, self.compute)
