"""Whether a request for blocks is admitted: one decision for sessions and for requests without a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from node.serving.adapters.store import AdapterStore, HopAdapter
from tensor_codec.errors import Draining
from tensor_codec.span_spec import SpanSpec

LEAVING = "this node is leaving the swarm"


@dataclass(slots=True)
class SpanAdmission:
    """The blocks that are served now.  Both listeners of a served span share one admission.

    spec: of the blocks that are admitted; the span has these at least.  draining: nothing new is admitted.
    adapters: that peers may ask for; None: of none but the spec's.
    """

    spec: SpanSpec
    draining: bool = False
    adapters: AdapterStore | None = None

    def admits(self, asked: SpanSpec) -> None:
        """Raise Draining or WrongRevision unless the span asked for is served now.

        Whether an adapter is held here is a question of the peer that asks: see `using`.
        """
        self.check_open()
        self.spec.admits(asked if self.adapters is None else replace(asked, adapter=None))

    def using(
        self, peer: str, asked: SpanSpec, clock: Callable[[], float]
    ) -> AbstractContextManager[HopAdapter | None]:
        """The adapter that a peer asks for, held within the context; None where it asks for none.

        Raises NoAdapter, WrongRevision.
        """
        if asked.adapter is None or self.adapters is None:
            return nullcontext()
        return self.adapters.using(peer, asked.adapter, asked.blocks, clock)

    def check_open(self) -> None:
        """Raise Draining where nothing new is admitted."""
        if self.draining:
            raise Draining(LEAVING)

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True
