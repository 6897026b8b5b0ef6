"""The one layer that the library's base model has here: all blocks, at the servers."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from client.hf.access import SwarmAccess
from client.hf.cache import RemoteCache
from client.hf.padding import to_back, to_front


@dataclass(slots=True, eq=False)
class Call:
    """One forward of a base model, as its remote layer needs it.

    cache: of the call; None for a pass without one.  pads: the left padding of each row.  prefix: positions
    of a soft prompt in front, in this call.  tokens: of each row, padding included and prefix not.
    last_only: the caller uses the last position alone.  stops: blocks before which hidden states are wanted.
    deep: prompts that are added at each block, [blocks, prompt, hidden].
    states: the hidden states at `stops`, once the layer has run.
    """

    swarm: SwarmAccess
    cache: RemoteCache | None
    pads: Tensor | None
    prefix: int
    tokens: int
    last_only: bool = False
    stops: Sequence[int] = ()
    deep: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, prefix + tokens, hidden] through all blocks -> [rows, tokens or 1, hidden]."""
        if self.cache is not None:
            return self._cached(self.cache, hidden)
        if 0 in self.stops:
            self.states[0] = hidden[:, self.prefix :]
        turned = hidden if self.pads is None else to_front(hidden, self.pads, self.prefix)
        begin = 0
        for stop in sorted({*self.stops, self.swarm.blocks} - {0}):
            deep = None if self.deep is None else self.deep[begin:stop]
            turned = self.swarm.run(turned, begin, stop, deep)
            found = turned if self.pads is None else to_back(turned, self.pads, self.prefix)
            self.states[stop] = found[:, self.prefix :]
            begin = stop
        return self.states[self.swarm.blocks]

    def _cached(self, cache: RemoteCache, hidden: Tensor) -> Tensor:
        last_only = self.last_only and not self.stops
        if 0 in self.stops:
            self.states[0] = hidden[:, self.prefix :]
        cache.see([stop for stop in self.stops if stop])
        found = cache.step(hidden, self.tokens, last_only=last_only)
        for stop, state in zip(cache.stops, found, strict=True):
            kept = state if last_only else state[:, self.prefix :]
            self.states[stop] = kept.to(hidden.device, hidden.dtype)
        return self.states[self.swarm.blocks]


CALL: ContextVar[Call] = ContextVar("call of a remote layer")


class RemoteLayer(nn.Module):
    """In place of the blocks of the library's model: it runs the present `Call`."""

    def __init__(self, answers_tuple: bool) -> None:
        super().__init__()
        self._answers_tuple = answers_tuple

    def forward(self, hidden_states: Tensor, *args: object, **arguments: object) -> object:
        """Hidden states [rows, tokens, hidden], in the form in which the library's blocks answer."""
        found = CALL.get().run(hidden_states)
        if missing := hidden_states.shape[1] - found.shape[1]:  # the library may expect its input's shape
            found = nn.functional.pad(found, (0, 0, missing, 0))
        return (found,) if self._answers_tuple else found
