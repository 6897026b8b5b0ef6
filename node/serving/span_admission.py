"""Whether a request for blocks is admitted: one decision for sessions and for requests without a session."""

from __future__ import annotations

from dataclasses import dataclass

from tensor_codec.errors import Draining
from tensor_codec.span_spec import SpanSpec

LEAVING = "this node is leaving the swarm"


@dataclass(slots=True)
class SpanAdmission:
    """The blocks that are served now.  Both listeners of a served span share one admission.

    spec: of the blocks that are admitted; the span has these at least.  draining: nothing new is admitted.
    """

    spec: SpanSpec
    draining: bool = False

    def admits(self, asked: SpanSpec) -> None:
        """Raise Draining or WrongRevision unless the span asked for is served now."""
        self.check_open()
        self.spec.admits(asked)

    def check_open(self) -> None:
        """Raise Draining where nothing new is admitted."""
        if self.draining:
            raise Draining(LEAVING)

    def drain(self) -> None:
        """Admit nothing new from now on."""
        self.draining = True
