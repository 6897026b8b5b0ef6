"""One attack as a value: how it runs, what it must leave to others, and what its own counts must say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hostile.judgement import Thresholds
from tests.hostile.stage import Stage

Blocks = tuple[int, int]
Check = Callable[[Mapping[str, Any]], list[str]]  # Any: JSON
# A flood of connections and the newcomers want the same thing.
CONNECTIONS = Thresholds(newcomers_in=0.95)
# Prompts and tokens are work for anybody, and a chunk is no shorter than a pass over the weights.
SHARED = Thresholds(honest_share=0.7, p95_ratio=3.0)
# Uploads of adapters are paced, hashed in pieces and refused; hardly anybody's token waits for them.
UPLOADS = Thresholds(p95_ratio=1.2)


def nothing_more(got: Mapping[str, Any]) -> list[str]:
    """The honest peers' values say everything."""
    return []


@dataclass(frozen=True, slots=True)
class Attack:
    """run: prepares, calls `Stage.ready`, and attacks until it is cancelled or done.

    spans: the blocks of each node; the first is attacked.  check: what is wrong with the attacker's counts.
    announces: newcomers announce themselves meanwhile, and an observer looks for them.
    stretch: so many times as long as others, where it takes seconds until a lie is found out.
    """

    run: Callable[[Stage], Awaitable[None]]
    thresholds: Thresholds = field(default_factory=Thresholds)
    spans: tuple[Blocks, ...] = ((0, 30),)
    check: Check = nothing_more
    announces: bool = False
    stretch: int = 1

    @property
    def name(self) -> str:
        """As the command line has it."""
        return self.run.__name__

    @property
    def what(self) -> str:
        """What it does, in a line."""
        return (self.run.__doc__ or "").partition("\n")[0]
