"""The models that a gateway serves: the swarm's own, and that one with each of the operator's adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from client.api import SwarmLike
from client.gateway.openai.errors import RequestError
from client.lengths import SessionLengths
from node.config import ConfigError
from routing.blocks import Blocks, gaps
from routing.chains.alternatives import suitable

if TYPE_CHECKING:
    from client.adapters.upload import AnyAdapter

log = logging.getLogger("raceme")

KEPT_SHARE = 0.25  # of the cache that is free at a usual server


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under a name.  adapter: None for the model itself.  virtual_tokens: of a prefix."""

    name: str
    adapter: AnyAdapter | None = None
    virtual_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The models of one gateway.  created: Unix time of its start."""

    swarm: SwarmLike
    created: int
    models: Mapping[str, ServedModel] = field(default_factory=dict)  # the first one is the swarm's own

    @property
    def first(self) -> ServedModel:
        """The model without an adapter."""
        return next(iter(self.models.values()))

    def find(self, name: str | None) -> ServedModel:
        """The model of that name; without a name the first.  Raises RequestError, 404."""
        if not name:
            return self.first
        found = self.models.get(name)
        if found is None:
            raise RequestError(
                404,
                f"the model {name[:200]!r} does not exist here: {', '.join(self.models)}",
                code="model_not_found",
                param="model",
            )
        return found

    def missing_blocks(self) -> tuple[Blocks, ...]:
        """The runs of blocks that no usable server holds now."""
        swarm = self.swarm
        spans = swarm.view().spans(swarm.info.revision, swarm.info.blocks)
        return gaps(suitable(spans, swarm.config.constraints), Blocks(0, swarm.info.blocks))

    def max_length(self, model: ServedModel) -> int:
        """Tokens of prompt and answer together, as model, servers and gateway allow now."""
        swarm = self.swarm
        lengths = SessionLengths(swarm.info, swarm.config.limits, swarm.config.constraints, swarm.view)
        return max(1, lengths.longest(1) - model.virtual_tokens)

    def kept_tokens(self) -> int:
        """Tokens that idle conversations may hold in the servers' caches, which others need too."""
        swarm = self.swarm
        spans = suitable(swarm.view().spans(swarm.info.revision, swarm.info.blocks), swarm.config.constraints)
        return int(KEPT_SHARE * median(span.cache_tokens for span in spans)) if spans else 0

    def body(self, model: ServedModel) -> dict[str, Any]:  # Any: JSON
        """OpenAI's object of a model, with what a caller can know of the swarm."""
        info, missing = self.swarm.info, self.missing_blocks()
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "raceme",
            "max_model_len": self.max_length(model),
            **({} if model.adapter is None else {"parent": self.first.name}),
            "raceme": {
                "revision": info.revision,
                "blocks": info.blocks,
                "complete": not missing,
                "holes": [[run.start, run.stop] for run in missing],
            },
        }

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: the weights and the arithmetic of the servers."""
        info = self.swarm.info
        spans = self.swarm.view().spans(info.revision, info.blocks)
        dtypes = sorted({span.dtype for span in spans})
        return f"raceme-{info.revision[:8]}-{'+'.join(dtypes) or 'unknown'}"


def read_adapters(named: Sequence[str], swarm: SwarmLike) -> dict[str, AnyAdapter]:
    """The adapters of --adapter by their names; reads files.  Raises ConfigError."""
    from client.adapters.folder import is_to_be_read, load_adapter

    found: dict[str, AnyAdapter] = {}
    for each in named:
        name, equals, place = each.partition("=")
        if not equals:
            place = each
            name = Path(each).name if is_to_be_read(each) else each
        if not name or name in found:
            raise ConfigError(f"--adapter {each}: {'no name' if not name else 'its name is given twice'}")
        found[name] = load_adapter(place, swarm) if is_to_be_read(place) else place
    return found


def served_models(
    swarm: SwarmLike, name: str | None, adapters: Mapping[str, AnyAdapter], created: int
) -> ServedModels:
    """The models under their names.  name: of the swarm's own; None: the one that it has."""
    first = name or swarm.info.name
    models = {first: ServedModel(first)}
    for own, adapter in adapters.items():
        virtual = getattr(adapter, "virtual_tokens", 0)
        models[f"{first}:{own}"] = ServedModel(f"{first}:{own}", adapter, virtual)
    return ServedModels(swarm, created, models)
