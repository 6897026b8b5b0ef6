"""The reason why there is no chain, for people.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from routing.chains.alternatives import Constraints, has_adapter
from routing.chains.hops import NoChain
from routing.view.records import Record
from routing.view.view import SwarmView


def explain_length(none: NoChain, spans: Sequence[Record], tokens: int) -> NoChain:
    """The error, with the sizes that servers of the missing blocks take, if less than `tokens`."""
    longest = [span.session_tokens for span in spans if _serves_missing(span, none)]
    if any(0 < taken < tokens for taken in longest):
        none.explain(asked_tokens=tokens, session_tokens=max(longest))
    return none


def explain(none: NoChain, view: SwarmView, model: str, revision: str, constraints: Constraints) -> NoChain:
    """The error, with peers that do not answer or are left out by the constraints; or another error, where
    the swarm serves other models."""
    served = view.models()
    if served and revision not in {key.revision for key in served}:
        ours = f"not {model} (revision {revision})"
        instead = [f"{key.model} (revision {key.revision})" for key in served]
        return NoChain(none.missing, none.blocks, alone=True, instead=[*instead, ours])
    of_use = [span for span in view.spans(revision, none.blocks, silent=True) if _serves_missing(span, none)]
    answering = [span for span in of_use if span.peer not in view.silent and view.reaches(span)]
    adapter = constraints.adapter or ""
    none.explain(
        silent=len(of_use) - len(answering),
        constrained=sum(not constraints.admits(span) for span in answering),
        adapter="" if not answering or any(has_adapter(span, adapter) for span in answering) else adapter,
    )
    return none


def _serves_missing(span: Record, none: NoChain) -> bool:
    return any(start < span.stop and span.start < stop for start, stop in none.missing)
