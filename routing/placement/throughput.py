"""The measure of placement: the tokens per second that servers can compute with the blocks they hold.

Server i computes rate_i block-tokens per second and may share them among its blocks in any way.  The
capacity is the largest f such that every block gets f tokens per second.  By Hall's theorem that is

    min over sets S of blocks:  (sum of the rates of the servers that hold any block of S) / |S|

Since spans are intervals, the sum grows along the blocks of S: block b adds the servers that hold b and start
after the block of S before it.  So the worst set at a given f is a shortest path over the blocks, in
O(blocks**2), and a few shortest paths find the smallest quotient (Dinkelbach's method); its set is the
bottleneck.  It need not be one run of blocks: two ends of one server's span can be short together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks
from routing.names import PeerId

Floats = NDArray[np.float64]


class Holder(NamedTuple):
    """A peer that holds the blocks [start, stop) and computes `rate` block-tokens per second.

    online: whether it serves them now; else it is loading them.
    relays: the peers through which alone it can be dialled; empty where it can be dialled directly.
    """

    peer: PeerId
    start: int
    stop: int
    rate: float
    online: bool = True
    relays: tuple[PeerId, ...] = ()

    @property
    def blocks(self) -> Blocks:
        """The blocks that it holds."""
        return Blocks(self.start, self.stop)


class Bottleneck(NamedTuple):
    """The capacity in tokens per second, and the blocks that limit it."""

    capacity: float
    blocks: tuple[int, ...]


def capacity(servers: Sequence[Holder], blocks: int) -> float:
    """Tokens per second that all blocks can get at once; 0 where some block has no server."""
    return bottleneck(servers, blocks).capacity


def bound(servers: Sequence[Holder], blocks: int) -> float:
    """The capacity, in tokens per second, that no placement of these servers exceeds."""
    return math.fsum(server.rate for server in servers) / blocks


def bottleneck(servers: Sequence[Holder], blocks: int) -> Bottleneck:
    """The capacity and the set of blocks that limits it.

    The servers of these blocks have no compute to spare; the other servers have some, or hold none of them.
    """
    return narrowest(reach(servers, blocks))


def reach(servers: Sequence[Holder], blocks: int) -> Floats:
    """The rates that block b adds to a set of blocks that has none of p..b-1: [p, b], (blocks + 1, blocks).

    Each is the sum of the rates of the servers with p <= start <= b < stop.
    """
    added = np.zeros((blocks + 1, blocks + 1))
    if servers:
        starts = np.array([server.start for server in servers])
        stops = np.array([min(server.stop, blocks) for server in servers])
        rates = np.array([server.rate for server in servers], dtype=float)
        np.add.at(added, (starts, starts), rates)
        np.subtract.at(added, (starts, stops), rates)
    holding = np.cumsum(added, axis=1)[:, :blocks]  # [s, b]: rates of holders of b that start at s
    total: Floats = np.cumsum(holding[::-1], axis=0)[::-1]
    return np.maximum(total, 0.0)


def narrowest(added: Floats) -> Bottleneck:
    """The bottleneck, from the result of `reach`."""
    blocks = added.shape[1]
    chosen = tuple(range(blocks))
    rate = _quotient(added, chosen)
    while True:
        worst = _worst_set(added, rate)
        lower = _quotient(added, worst) if worst else rate
        if not lower < rate * (1 - 1e-12):
            return Bottleneck(rate, chosen)
        rate, chosen = lower, worst


def _quotient(added: Floats, chosen: Sequence[int]) -> float:
    before = [0, *(block + 1 for block in chosen[:-1])]
    return max(0.0, math.fsum(added[before, list(chosen)])) / len(chosen)


def _worst_set(added: Floats, rate: float) -> tuple[int, ...]:
    """The blocks with the largest common shortfall where each demands `rate`."""
    ending, came = ends(added, rate)
    at = int(np.argmin(ending))
    chosen = []
    while at > 0:
        chosen.append(at - 1)
        at = came[at - 1]
    return tuple(chosen[::-1])


def ends(added: Floats, rate: float) -> tuple[Floats, list[int]]:
    """[p]: the minimum of rates less demand over sets whose last block is p - 1; 0 at [0], the empty set.

    The second value is, for each block, the p before it in its best set.
    """
    blocks = added.shape[1]
    least, came = np.zeros(blocks + 1), [0] * blocks
    for block in range(blocks):
        options = least[: block + 1] + added[: block + 1, block]
        came[block] = int(options.argmin())
        least[block + 1] = options[came[block]] - rate
    return least, came
