"""Load sharing among clients: clients that choose alone, from equal views, must not all choose one chain.

Three means.  Each gives a client the same answer at each choice, so that its sessions do not wander; the
first and the last differ from client to client:

* `client_bias`: a cost factor per peer, mostly small.  Among nearly equal chains each client prefers another
  one; a chain that is clearly the best stays the best.
* `queue_markup`: a queue costs more than its waiting time.
* `sample`: of many peers a client considers only some, fast peers more often.  That also bounds the work of a
  choice beside thousands of made-up servers, and one network's part of it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import statistics
from collections import Counter
from collections.abc import Collection, Container, Iterable, Sequence
from functools import lru_cache

from routing.names import PeerId
from routing.view.networks import network_of
from routing.view.records import Record
from routing.view.view import MAX_CLAIMED_SPEED

SPREAD = 0.3  # of a block's cost: the mean addition of a client's bias
# A queue counts as this many times its waiting time, since a client that joins it delays all later
# clients.  With 1 each client minimises its own wait, and all wait longer.
QUEUE_PENALTY = 4.0
MAX_PEERS = 64  # that a client considers: a search among them takes 2 to 5 ms
MIN_HOLDERS = 8  # of each block among the considered peers, where the swarm has as many
NETWORK_SHARE = 0.5  # of the considered peers, while peers of other networks are there

_Ranked = tuple[int, float, PeerId, Record]  # the peer is unique: records are never compared


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
    answering: Container[PeerId] = (),
) -> Sequence[Record]:
    """The peers that a client considers: all of them where there are `most` or fewer.

    Peers that have answered this client come first, since anybody can make up records.  Among equals peers
    are drawn without replacement in proportion to believed speed (Efraimidis and Spirakis, 2006), and stay
    while their records stay.  Peers of one public network take at most half of the places while there are
    others.  More than `most` are drawn where a block would have fewer than `MIN_HOLDERS`.

    always: peers to be included.  answering: peers that have answered a ping.  O(n log n).
    """
    if len(spans) <= most:
        return spans
    fastest = statistics.median([span.seconds_per_block for span in spans]) / MAX_CLAIMED_SPEED
    ranked = list[_Ranked]()
    for span in spans:
        peer = span.peer
        rank = -_log_uniform(seed, peer) * max(span.seconds_per_block, fastest)
        tier = 0 if peer in always else 1 if peer in answering else 2
        ranked.append((tier, rank, peer, span))
    ranked.sort()
    chosen, held = _spread_over_networks(ranked, most), [0] * max([span.stop for span in spans])
    for span in chosen:
        _hold(span, held)
    taken, left = {span.peer for span in chosen}, iter(ranked)
    while min(held) < MIN_HOLDERS and (best := next(left, None)) is not None:
        *_, peer, span = best
        if min(held[span.start : span.stop]) < MIN_HOLDERS and peer not in taken:
            chosen.append(span)
            _hold(span, held)
    return chosen


def _hold(span: Record, held: list[int]) -> None:
    for block in range(span.start, span.stop):
        held[block] += 1


def _spread_over_networks(ranked: Sequence[_Ranked], most: int) -> list[Record]:
    """The first `most`, of which one network has at most its share while there are others."""
    chosen, deferred, counts = list[Record](), list[Record](), Counter[str]()
    for *_, span in ranked:
        network = network_of(span.addresses)
        if network and counts[network] >= most * NETWORK_SHARE:
            deferred.append(span)
            continue
        counts[network] += 1
        chosen.append(span)
        if len(chosen) == most:
            break
    return chosen + deferred[: most - len(chosen)]


def rendezvous(seed: str, peers: Iterable[PeerId], most: int) -> list[PeerId]:
    """Up to `most` of these peers: different ones for each seed, and stable while peers come and go."""
    return heapq.nsmallest(most, peers, key=lambda peer: _uniform(seed, peer))


@lru_cache(maxsize=16_384)
def _log_uniform(seed: str, peer: PeerId) -> float:
    return math.log(_uniform(seed, peer))


def _uniform(seed: str, peer: PeerId) -> float:
    """A number between 0 and 1, both excluded; no peer id can rank high for every client."""
    digest = hashlib.blake2b(f"{seed} {peer}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48
