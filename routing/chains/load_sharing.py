"""How clients that decide by themselves, on the same news, do not all decide the same.

Three answers to the one question, the same at every choice of one client, so that its sessions do
not wander, and the first and the last are different from client to client:

* `leanings`: each peer is slower, for this client, than it is, most of them not much.  Of chains that
  are nearly equal each client then has its own favourite; one that is clearly the best stays the best.
* `shyness`: a queue is avoided more than its wait alone would ask for.
* `sample`: of very many peers a client looks at some only, the fast ones more often.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterable, Sequence

from routing.names import PeerId
from routing.view.records import Record

# Of a block's cost: what a leaning adds on average.
SPREAD = 0.3
# How much more than his own wait a chooser minds a queue: whoever joins it makes all those wait who come
# after him.  With 1, everybody's own shortest wait, all wait longer.
TOLL = 4.0
MAX_PEERS = 1500  # that a client looks at
MIN_HOLDERS = 8  # of each block among them, where there are so many


def leanings(seed: str, peers: Iterable[PeerId], spread: float = SPREAD) -> dict[PeerId, float]:
    """The factor, from 1 on and 1 + `spread` on average, by which a client finds each peer slower.

    What it adds is distributed exponentially: the more it weighs, the more nearly equal clients choose
    peers in proportion to their speeds, as the least of exponential variables falls in proportion to
    their rates.  seed: the client's.
    """
    return {peer: 1.0 - spread * math.log(_uniform(seed, peer)) for peer in peers}


def shyness(spans: Iterable[Record]) -> dict[PeerId, float]:
    """The factor, from 1 for an idle peer to TOLL, by which what a peer's blocks cost, waits included, is
    to be taken as more, so that all together wait less.

    A toll in the sense of Pigou: chosen by their own waits alone, clients crowd where it is fastest until
    it is no faster than elsewhere (Wardrop, 1952), and the swarm is slower than it need be.
    """
    return {span.peer: dearness(span.queue) / (1.0 + span.queue) for span in spans}


def dearness(queue: float) -> float:
    """How many times its computing a step is reckoned to cost where it waits for so many times that."""
    return 1.0 + TOLL * queue


def sample(
    spans: Sequence[Record],
    seed: str,
    *,
    most: int = MAX_PEERS,
    always: Collection[PeerId] = (),
) -> Sequence[Record]:
    """The peers that a client looks at, all of them where there are `most` or fewer.

    Drawn without replacement in proportion to announced speed (Efraimidis and Spirakis, 2006), the same
    ones as long as their records are; more than `most` where a block would have fewer than
    `MIN_HOLDERS`.  always: peers to be among them.  O(n log n).
    """
    if len(spans) <= most:
        return spans
    ranked = sorted(spans, key=lambda span: (span.peer not in always, _rank(seed, span), span.peer))
    chosen, held = ranked[:most], [0] * max(span.stop for span in spans)
    for span in chosen:
        for block in range(span.start, span.stop):
            held[block] += 1
    for span in ranked[most:]:
        if min(held[span.start : span.stop]) < MIN_HOLDERS:
            chosen.append(span)
            for block in range(span.start, span.stop):
                held[block] += 1
    return chosen


def rendezvous(seed: str, peers: Iterable[PeerId], most: int) -> list[PeerId]:
    """Up to `most` of these peers, others for each seed, the same ones for as long as they are there."""
    return heapq.nsmallest(most, peers, key=lambda peer: _uniform(seed, peer))


def _rank(seed: str, span: Record) -> float:
    return -math.log(_uniform(seed, span.peer)) * span.seconds_per_block


def _uniform(seed: str, peer: PeerId) -> float:
    """Between 0 and 1, neither included; nobody can choose his id for all clients' liking at once."""
    digest = hashlib.blake2b(f"{seed} {peer}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48
