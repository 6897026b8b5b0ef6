"""Loading of spans and blocks, with the reasons where that fails."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from node.config import ConfigError
from node.runtime.compute_thread import Runner
from node.serving.executor.engine import EngineSpan
from node.serving.served_span import (
    LOAD_FAULTS,
    ServedSpan,
    ServingSetup,
    forget_unused,
    load_blocks,
    load_served_span,
)
from routing.blocks import Blocks

log = logging.getLogger("raceme")


class Load(Protocol):
    """Loads a span to be served: `load_served_span`."""

    async def __call__(
        self, setup: ServingSetup, blocks: Blocks, compute: Runner, *, in_pieces: bool = False
    ) -> ServedSpan:
        """Raises LOAD_FAULTS."""


LoadBlocks = Callable[[ServingSetup, Blocks, Runner], Awaitable[Sequence[EngineSpan]]]


@dataclass(slots=True)
class SpanLoader:
    """Loads whole spans, and blocks next to a served span."""

    setup: ServingSetup
    compute: Runner
    load: Load = load_served_span
    load_blocks: LoadBlocks = load_blocks

    async def fits(self, runs: Sequence[Blocks]) -> bool:
        """Whether these blocks fit besides the loaded ones."""
        try:
            await self.compute.run(self.setup.check_room, sum(run.size for run in runs))
        except ConfigError:
            return False
        return True

    async def load_span(self, blocks: Blocks, *, in_pieces: bool = False) -> ServedSpan | str:
        """A span of these blocks; where loading fails, the reason.  in_pieces: see `load_served_span`."""
        try:
            return await self.load(self.setup, blocks, self.compute, in_pieces=in_pieces)
        except LOAD_FAULTS as error:
            failure = str(error)
        # By now the error is gone, and with it all that was loaded.
        log.warning("blocks %s could not be loaded: %s", blocks, failure)
        await self.forget()
        return failure

    async def extend(self, span: ServedSpan, missing: Sequence[Blocks]) -> str | None:
        """Load blocks next to those of a served span.  Where that fails: the reason, and nothing changes."""
        try:
            fresh = [s for run in missing for s in await self.load_blocks(self.setup, run, self.compute)]
            await span.take_up(fresh, self.compute)
            return None
        except LOAD_FAULTS as error:
            failure = str(error)
        fresh = []  # by now the error holds none of the loaded tensors either
        log.warning("blocks %s could not be loaded: %s", ", ".join(map(str, missing)), failure)
        await self.forget()
        return failure

    async def forget(self) -> None:
        """Give back the memory of weights that are referred to no longer."""
        await self.compute.run(forget_unused, self.setup.device)
