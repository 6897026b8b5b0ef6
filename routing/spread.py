"""How clients that decide by themselves, on the same news, do not all decide the same.

Two answers to the one question, both the same at every choice of one client, so that its sessions do
not wander, and both different from client to client:

* `leanings`: each peer is slower, for this client, than it is, most of them not much.  Of chains that
  are nearly equal each client then has its own favourite; one that is clearly the best stays the best.
* `sample`: of very many peers a client looks at some only, the fast ones more often.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence

from routing.names import PeerId
from routing.records import Record

# Of a block's cost: what a leaning adds on average.  In a queueing model of 40 servers of unlike speeds at
# 80 % load, with views up to 30 s old, clients got 0.79 of what they asked for with 0, 0.92 with 1, 0.96
# with 2 and 0.98 with 4, while the p95 of a step's seconds fell from 1.03 to 0.69, 0.68 and 0.65.
SPREAD = 2.0
# The same within a session: it has seen a hop become slow, and is not to take that for a matter of taste.
SPREAD_WITHIN = 0.3
MOST_PEERS = 1500  # that a client looks at
LEAST_HOLDERS = 8  # of each block among them, where there are so many


def leanings(seed: str, peers: Iterable[PeerId], spread: float = SPREAD) -> dict[PeerId, float]:
    """The factor, from 1 on and 1 + `spread` on average, by which a client finds each peer slower.

    What it adds is distributed exponentially: the more it weighs, the more nearly equal clients choose
    peers in proportion to their speeds, as the least of exponential variables falls in proportion to
    their rates.  seed: the client's.
    """
    return {peer: 1.0 - spread * math.log(_uniform(seed, peer)) for peer in peers}


def sample(
    spans: Sequence[Record],
    seed: str,
    *,
    most: int = MOST_PEERS,
    always: Collection[PeerId] = (),
) -> Sequence[Record]:
    """The peers that a client looks at, all of them where there are `most` or fewer.

    Drawn without replacement in proportion to announced speed (Efraimidis and Spirakis, 2006), the same
    ones as long as their records are; more than `most` where a block would have fewer than
    `LEAST_HOLDERS`.  always: peers to be among them.  O(n log n).
    """
    if len(spans) <= most:
        return spans
    ranked = sorted(spans, key=lambda span: (span.peer not in always, _rank(seed, span), span.peer))
    chosen, held = ranked[:most], [0] * max(span.stop for span in spans)
    for span in chosen:
        for block in range(span.start, span.stop):
            held[block] += 1
    for span in ranked[most:]:
        if min(held[span.start : span.stop]) < LEAST_HOLDERS:
            chosen.append(span)
            for block in range(span.start, span.stop):
                held[block] += 1
    return chosen


def _rank(seed: str, span: Record) -> float:
    return -math.log(_uniform(seed, span.peer)) * span.seconds_per_block


def _uniform(seed: str, peer: PeerId) -> float:
    """Between 0 and 1, neither included; nobody can choose his id for all clients' liking at once."""
    digest = hashlib.blake2b(f"{seed} {peer}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48
