"""The yardstick of placement: how many tokens per second can these servers do, with what they hold?

Server i computes rate_i block-tokens per second and shares them among its blocks as it likes.  The
capacity is the largest f such that every block gets f tokens per second.  By Hall's theorem that is

    min over sets S of blocks:  (sum of the rates of the servers that hold any block of S) / |S|

Since spans are intervals, a set adds up along its blocks: b adds the servers that hold b and start
after the block of S before it.  So the worst set at a given f is a shortest path over the blocks,
O(blocks**2), and a few of them find the smallest quotient (Dinkelbach's method); the set is the
bottleneck.  No single run of blocks shows it: two ends of one server's span can be short together.
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
    """

    peer: PeerId
    start: int
    stop: int
    rate: float
    online: bool = True

    @property
    def blocks(self) -> Blocks:
        """The blocks that it holds."""
        return Blocks(self.start, self.stop)


class Bottleneck(NamedTuple):
    """The capacity in tokens per second, and the blocks that do not allow more."""

    capacity: float
    blocks: tuple[int, ...]


def capacity(servers: Sequence[Holder], blocks: int) -> float:
    """Tokens per second that every block can get at once; 0 where a block is held by nobody."""
    return bottleneck(servers, blocks).capacity


def bound(servers: Sequence[Holder], blocks: int) -> float:
    """What no placement of these servers can beat."""
    return math.fsum(server.rate for server in servers) / blocks


def bottleneck(servers: Sequence[Holder], blocks: int) -> Bottleneck:
    """The capacity and the set of blocks that limits it; the servers that hold any of these have no
    work to spare, all others have, or are no help.
    """
    return narrowest(reach(servers, blocks))


def reach(servers: Sequence[Holder], blocks: int) -> Floats:
    """The rates that a block adds to a set of blocks: [p, b] for block b, none of p..b-1 in the set.

    That is the sum over the servers with p <= start <= b < stop; shape (blocks + 1, blocks).
    """
    added = np.zeros((blocks + 1, blocks + 1))
    if servers:
        starts = np.array([server.start for server in servers])
        stops = np.array([min(server.stop, blocks) for server in servers])
        rates = np.array([server.rate for server in servers], dtype=float)
        np.add.at(added, (starts, starts), rates)
        np.subtract.at(added, (starts, stops), rates)
    holding = np.cumsum(added, axis=1)[:, :blocks]  # of those that start at s, who holds b
    total: Floats = np.cumsum(holding[::-1], axis=0)[::-1]
    return np.maximum(total, 0.0)


def narrowest(added: Floats) -> Bottleneck:
    """The bottleneck, from what `reach` gives."""
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
    """The blocks that lack most together where each asks for `rate`."""
    ending, came = ends(added, rate)
    at = int(np.argmin(ending))
    chosen = []
    while at > 0:
        chosen.append(at - 1)
        at = came[at - 1]
    return tuple(chosen[::-1])


def ends(added: Floats, rate: float) -> tuple[Floats, list[int]]:
    """[p]: the least of rates less demand over the sets whose last block is p - 1; [0], the empty set, is 0.

    The second value says of each block the p that came before it in its best set.
    """
    blocks = added.shape[1]
    least, came = np.zeros(blocks + 1), [0] * blocks
    for block in range(blocks):
        options = least[: block + 1] + added[: block + 1, block]
        came[block] = int(options.argmin())
        least[block + 1] = options[came[block]] - rate
    return least, came


def shares(servers: Sequence[Holder], blocks: int) -> tuple[float, Floats]:
    """The capacity by linear programming, and what each server then does of each block.

    Returns tokens per second, and block-tokens per second of shape (servers, blocks).  Much slower
    than `capacity`, which needs no programme; this one tells who does what.
    """
    from scipy.optimize import linprog  # 0.3 s that only those pay who ask for it
    from scipy.sparse import coo_array

    pairs = [(i, b) for i, s in enumerate(servers) for b in range(s.start, min(s.stop, blocks))]
    if not pairs:
        return 0.0, np.zeros((len(servers), blocks))
    who, what = (np.array(side) for side in zip(*pairs, strict=True))
    columns, demand = np.arange(len(pairs)), np.arange(blocks)
    rows = np.concatenate([who, len(servers) + what, len(servers) + demand])
    at = np.concatenate([columns, columns, np.full(blocks, len(pairs))])
    values = np.concatenate([np.ones(len(pairs)), -np.ones(len(pairs)), np.ones(blocks)])
    shape = (len(servers) + blocks, len(pairs) + 1)
    limits = np.array([*(server.rate for server in servers), *([0.0] * blocks)])
    objective = np.zeros(len(pairs) + 1)
    objective[-1] = -1.0
    found = linprog(
        objective, A_ub=coo_array((values, (rows, at)), shape).tocsc(), b_ub=limits, method="highs"
    )
    if found.status != 0:
        raise ArithmeticError(f"the programme of {len(servers)} servers: {found.message}")
    done = np.zeros((len(servers), blocks))
    done[who, what] = found.x[:-1]
    return float(found.x[-1]), done
