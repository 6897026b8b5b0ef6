"""Load sharing among clients: clients that choose alone, from equal views, must not all choose one chain.

Three means.  Each gives a client the same answer at each choice, so that its sessions do not wander; the
first and the last differ from client to client:

* `client_bias`: a cost factor per peer, mostly small.  Among nearly equal chains each client prefers another
  one; a chain that is clearly the best stays the best.
* `queue_markup`: a queue costs more than its waiting time.
* `sample`: of very many peers a client considers only some, fast peers more often.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterable, Sequence

from routing.names import PeerId
from routing.view.records import Record

SPREAD = 0.3  # of a block's cost: the mean addition of a client's bias
# A queue counts as this many times its waiting time, since a client that joins it delays all later
# clients.  With 1 each client minimises its own wait, and all wait longer.
QUEUE_PENALTY = 4.0
MAX_PEERS = 1500  # that a client considers
MIN_HOLDERS = 8  # of each block among the considered peers, where the swarm has as many


def client_bias(seed: str, peers: Iterable[PeerId], spread: float = SPREAD) -> dict[PeerId, float]:
    """Per-peer cost factor of one client: 1 + Exp(spread), at least 1 and 1 + `spread` on average.

    The minimum of exponential variables falls to each in proportion to its rate, so many clients choose
    nearly equal peers in proportion to their speeds.  seed: the client's.
    """
    return {peer: 1.0 - spread * math.log(_uniform(seed, peer)) for peer in peers}


def queue_markup(spans: Iterable[Record]) -> dict[PeerId, float]:
    """Per-peer factor on the cost of a block, queueing included: 1 for an idle peer, up to QUEUE_PENALTY.

    It is a Pigou toll.  Without it clients crowd at the fastest peer until that is as slow as the others
    (Wardrop, 1952), and the whole swarm is slower than it could be.
    """
    return {span.peer: queue_price(span.queue) / (1.0 + span.queue) for span in spans}


def queue_price(queue: float) -> float:
    """The cost of a step behind a queue, in times of the step's own computing.

    queue: the step's waiting time, in the same unit.
    """
    return 1.0 + QUEUE_PENALTY * queue


def sample(
    spans: Sequence[Record],
    seed: str,
    *,
    most: int = MAX_PEERS,
    always: Collection[PeerId] = (),
) -> Sequence[Record]:
    """The peers that a client considers: all of them where there are `most` or fewer.

    They are drawn without replacement in proportion to announced speed (Efraimidis and Spirakis, 2006), and
    stay while their records stay.  More than `most` are drawn where a block would have fewer than
    `MIN_HOLDERS`.  always: peers to be included.  O(n log n).
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
    """Up to `most` of these peers: different ones for each seed, and stable while peers come and go."""
    return heapq.nsmallest(most, peers, key=lambda peer: _uniform(seed, peer))


def _rank(seed: str, span: Record) -> float:
    return -math.log(_uniform(seed, span.peer)) * span.seconds_per_block


def _uniform(seed: str, peer: PeerId) -> float:
    """A number between 0 and 1, both excluded; no peer id can rank high for every client."""
    digest = hashlib.blake2b(f"{seed} {peer}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48
