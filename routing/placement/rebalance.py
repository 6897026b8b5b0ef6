"""Which blocks should a server hold?  The swarm's capacity decides: `routing.placement.throughput`.

The aims, in this order: no block without a holder; capacity; `min_replicas` holders of each block; short
chains, which need spans that begin where others end.

Capacity alone is a poor guide: one bottleneck hides the next, and most single moves do not change the
capacity at all.  So moves lower the *shortfall*: the rate that the worst set of blocks lacks where each block
demands a given share of the bound, summed over a few shares.  The shortfall is 0 exactly where the capacity
reaches the highest share, and every move lowers it, so moves come to an end.  A shortfall of few blocks is a
small part of the swarm's work and still limits all of it.  So once the capacity is good, only one demand is
considered, just above the target, and a move that halves its shortfall is made.

A server takes as many blocks as its memory holds, however slow it is: more blocks never lower the capacity,
since a server computes only the share of its blocks that the others leave, and they make chains shorter.
`--num-blocks` is for operators that want to load fewer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks, coverage
from routing.names import PeerId
from routing.placement.cover_gaps import MOVE_EFFORT
from routing.placement.goals import MIN_REPLICAS, QUALITY
from routing.placement.throughput import Floats, Holder, bound, capacity, ends, narrowest, reach
from routing.view.records import Record
from routing.view.view import RELAYED_BYTES_PER_SECOND

Single = NDArray[np.float32]

LEVELS = (0.5, 0.75, 0.9, 1.0)  # of the bound: the demands at which the shortfall is computed
PLAUSIBLE = 3.0  # times the upper quartile of the claimed rates: claims up to this count in full
ALIKE = 1e-4  # of the swarm's work: windows of a joining server that differ by less count as equal
MIN_GAIN = 0.002  # of the swarm's work, summed over the levels: a move must gain more
MIN_SHARE = 0.5  # of the shortfall, once the capacity is good: a move that gains more is made in any case
LARGE_GAIN = 0.01  # of the swarm's work: after a move of more the next best one is made at once too
MAX_AT_ONCE = 4
GOOD = 0.9  # of the bound: from this capacity on replicas count too, and no move lowers it again
REPLICA_WORTH = 0.001  # of the swarm's work, for each missing holder of a block
REPLICA_HINT = 1e-6  # of the swarm's work, while the capacity is too low: decides between equals
MAX_MOVERS = 32  # servers whose moves are compared, at all levels; a decision's time grows with it
RANK_CHANCE = 0.25  # that a move of rank 1 is made, in case the best moves are not; to the power of the rank


def holders(spans: Sequence[Record], position_bytes: int = 0) -> list[Holder]:
    """The blocks and rates of these peers, in the order of their ids.

    position_bytes: of one position's hidden state on the wire; 0: not known.  A relayed peer computes no more
    than its relay carries: each token's hidden state goes in and comes out.

    A peer that has not measured its rate counts as the median of the others; where no peer has, as one block
    per second.  Claimed rates count as `plausible` says.  A peer that is about to move counts at its new
    blocks, and not as online: no move relies on the blocks that it leaves.
    """
    rates = plausible({s.peer: 1.0 / s.seconds_per_block for s in spans if s.seconds_per_block > 0})
    usual = sorted(rates.values())[len(rates) // 2] if rates else 1.0
    through_relay = RELAYED_BYTES_PER_SECOND / (2 * position_bytes) if position_bytes else math.inf

    def rate_of(span: Record) -> float:
        held = span.next_stop - span.next_start if span.moves else span.stop - span.start
        most = through_relay * held if span.reach == "relayed" else math.inf
        return min(rates.get(span.peer, usual), most)

    return [
        Holder(
            s.peer,
            s.next_start if s.moves else s.start,
            s.next_stop if s.moves else s.stop,
            rate_of(s),
            s.state == "online" and not s.moves,
            s.every_relay if s.reach == "relayed" else (),
        )
        for s in sorted(spans, key=lambda s: s.peer)
    ]


def plausible(claims: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """The rate at which each peer counts, by the rate that it claims.

    Claims count in full up to PLAUSIBLE times their upper quartile; a cap at the median would ignore most of
    the capacity of honest fast servers.  Beyond that a peer counts less the more it claims, down to the
    median, so that exaggeration does not pay.
    """
    if not claims:
        return {}
    order = sorted(claims.values())
    most = PLAUSIBLE * order[3 * (len(order) - 1) // 4]
    median = order[(len(order) - 1) // 2]
    return {peer: rate if rate <= most else max(median, most * most / rate) for peer, rate in claims.items()}


def choose_blocks(
    spans: Sequence[Record],
    blocks: int,
    count: int,
    rng: random.Random | None = None,
    *,
    seconds_per_block: float = 0.0,
    min_replicas: int = MIN_REPLICAS,
    position_bytes: int = 0,
) -> Blocks:
    """The window of `count` blocks that a joining server takes: `best_window` of records.

    spans: of the same model revision, joining peers too.
    seconds_per_block: the server's own; 0 where it has not measured: then it counts as the median.
    position_bytes: see `holders`.
    """
    held = holders(spans, position_bytes)
    rates = sorted(holder.rate for holder in held)
    usual = rates[len(rates) // 2] if rates else 1.0
    rate = 1.0 / seconds_per_block if seconds_per_block > 0 else usual
    return best_window(held, blocks, count, rate, rng, min_replicas=min_replicas)


def best_window(
    held: Sequence[Holder],
    blocks: int,
    count: int,
    rate: float,
    rng: random.Random | None = None,
    *,
    min_replicas: int = MIN_REPLICAS,
) -> Blocks:
    """The window of `count` blocks that needs a new server of this rate most.

    A count above `blocks` gives all blocks.  Ties go to the lowest start, or to chance where `rng` is given:
    servers that start at one moment do not see each other yet, and should not all choose one window.
    O(blocks**2).  Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} blocks, at least 1 is needed")
    count = min(count, blocks)
    most = bound(held, blocks) + rate / blocks
    total = sum(holder.rate for holder in held) + rate
    rest = _single(reach(held, blocks))[None]
    lack = np.zeros(blocks - count + 1)
    for level in LEVELS:
        found = _shortfalls(rest, level * most, np.array([rate]), np.array([count]))[0]
        lack += found[: blocks - count + 1] / total
    number = np.array(coverage(held, blocks))
    filled = _windows(number == 0, count)
    spare = _windows(replicas(held, blocks, min_replicas) < min_replicas, count)
    seams = {holder.start for holder in held} | {holder.stop for holder in held} | {0, blocks}
    worse = ((lack - lack.min()) / ALIKE).astype(int)  # from the least on: equals differ in the last digits
    order = [
        (-int(filled[s]), int(worse[s]), -int(spare[s]), -(s in seams) - (s + count in seams))
        for s in range(blocks - count + 1)
    ]
    best = min(order)
    tied = [start for start, key in enumerate(order) if key == best]
    start = rng.choice(tied) if rng is not None else tied[0]
    return Blocks(start, start + count)


def replicas(held: Sequence[Holder], blocks: int, min_replicas: int) -> NDArray[np.int64]:
    """How many holders each block has, as far as they do not all hang on one peer.

    A block whose holders are all reached through one and the same relay lacks a holder, however many there
    are: the end of that relay takes them all away.
    """
    number = np.array(coverage(held, blocks))
    direct = coverage((holder for holder in held if not holder.relays), blocks)
    for block in np.flatnonzero((number > 0) & (np.array(direct) == 0)):
        ways = {relay for holder in held if holder.start <= block < holder.stop for relay in holder.relays}
        if len(ways) < 2:
            number[block] = min(int(number[block]), min_replicas - 1)
    return number


class Move(NamedTuple):
    """A server's best move.  gain: in shares of the swarm's work.

    rank: 0 for moves that are made at once; higher ranks are for the case that a move of rank 0 is not made.
    """

    gain: float
    peer: PeerId
    start: int
    stop: int
    rank: int = 0

    @property
    def blocks(self) -> Blocks:
        """The new window."""
        return Blocks(self.start, self.stop)


def better_window(
    held: Sequence[Holder],
    blocks: int,
    me: PeerId,
    count: int,
    *,
    quality: float = QUALITY,
    min_replicas: int = MIN_REPLICAS,
    rng: random.Random,
) -> Blocks | None:
    """The window that this server should move to now, or None: stay.

    held: of all servers, this one included; a server that announced a move counts at its new blocks.
    quality: at this share of the bound no server moves for the capacity.

    Every server works out the same moves (`moves`).  Moves of rank 0 are made; a move of rank 1 with a chance
    of one in four, of rank 2 with one in 16, so that the swarm does not wait for a server that is pinned or
    gone.
    """
    if not any(holder.peer == me for holder in held):
        return None
    found = moves(held, blocks, quality=quality, counts={me: count}, min_replicas=min_replicas)
    return in_turn(found, me, rng)


def in_turn(ranked: Sequence[Move], me: PeerId, rng: random.Random) -> Blocks | None:
    """The window of this server's move, with the chance of the move's rank; else None."""
    for move in ranked:
        if move.peer == me:
            return move.blocks if rng.random() < RANK_CHANCE**move.rank else None
    return None


def moves(
    held: Sequence[Holder],
    blocks: int,
    *,
    quality: float = QUALITY,
    counts: dict[PeerId, int] | None = None,
    min_replicas: int = MIN_REPLICAS,
) -> list[Move]:
    """Moves that pay: a few to be made at once, then the best move of each other server.

    counts: blocks that a server has memory for, where known; else the number that it holds.
    Moves of rank 0 are the best move, the best one after it, and so on, at most MAX_AT_ONCE.  No block
    loses its last online holder, in any order of these moves.  O(MAX_MOVERS * blocks**2).
    """
    first = ranked = _single_moves(held, blocks, quality, counts or {}, min_replicas)
    made: list[Move] = []
    while ranked:
        move = ranked[0]
        made.append(move)
        if len(made) == MAX_AT_ONCE or move.gain < LARGE_GAIN:
            break
        held = _after(held, move)
        ranked = _single_moves(held, blocks, quality, counts or {}, min_replicas)
    going = {move.peer for move in made}
    others = [move for move in first if move.peer not in going]
    return [*made, *(move._replace(rank=rank) for rank, move in enumerate(others, 1))]


def _single_moves(
    held: Sequence[Holder], blocks: int, quality: float, counts: dict[PeerId, int], min_replicas: int
) -> list[Move]:
    """The best move of each server that has one, the greatest gain first."""
    held = sorted(held, key=lambda h: h.peer)  # one order of adding: one result at every server
    most, added = bound(held, blocks), reach(held, blocks)
    number = np.array(coverage(held, blocks))
    if not held:
        return []
    now_able = narrowest(added).capacity if number.min() > 0 else 0.0
    enough = min(quality, GOOD) * most  # capacity from which replicas count too
    good = 0 < enough <= now_able
    last = good and now_able < quality * most  # the last few percent: a small set of blocks may lack them
    safe = replicas(held, blocks, min_replicas)
    if good and not last and safe.min() >= min_replicas:
        return []
    levels = ((1 + quality) / 2,) if good else LEVELS
    movers = _movers(held, blocks, added, MAX_MOVERS * len(LEVELS) // len(levels))
    if not movers:
        return []
    rates = np.array([mover.rate for mover, _ in movers])
    room = [min(blocks, counts.get(m.peer, m.stop - m.start)) for m, _ in movers]
    rest = np.repeat(_single(added)[None], len(movers), axis=0)
    for row, (mover, _) in enumerate(movers):
        rest[row, : mover.start + 1, mover.start : mover.stop] -= mover.rate
    total = most * blocks
    lack, now = np.zeros((len(movers), blocks)), 0.0
    for level in levels:
        lack += _shortfalls(rest, level * most, rates, np.array(room)) / total
        now += -float(ends(added, level * most)[0].min()) / total
    found = []
    for row, (mover, keep) in enumerate(movers):
        gains = now - lack[row]
        more = _replicas_gained(safe, mover, room[row], min_replicas)
        worth = gains.copy()
        worth[: len(more)] += (REPLICA_WORTH if good else REPLICA_HINT) * more
        worth[gains < (-np.inf if good else MIN_GAIN)] = -np.inf
        window = _best_start(worth, mover, room[row], keep, blocks)
        gain = float(worth[window])
        lost = _holes_after(number, mover, window, window + room[row]) - int((number == 0).sum())
        large = gain > MIN_GAIN or (last and gain > 0 and gains[window] > MIN_SHARE * now)
        if lost <= 0 and (large or lost < 0):
            worth = (gain - lost) / _effort(mover, window, room[row])
            found.append((worth, Move(gain - lost, mover.peer, window, window + room[row])))
    ranked = [move for _, move in sorted(found, key=lambda f: (-round(f[0], 6), f[1].peer))]
    if good:
        return [m for m in ranked[:MAX_AT_ONCE] if capacity(_after(held, m), blocks) >= enough]
    return ranked


def _after(held: Sequence[Holder], move: Move) -> list[Holder]:
    """The holders after a move has been announced."""
    return [
        h._replace(start=move.start, stop=move.stop, online=False) if h.peer == move.peer else h for h in held
    ]


def _replicas_gained(
    number: NDArray[np.int64], mover: Holder, count: int, min_replicas: int
) -> NDArray[np.int64]:
    """By window, the number of missing holders that this server's move there provides."""
    without = number.copy()
    without[mover.start : mover.stop] -= 1
    wanted = without < min_replicas
    gained: NDArray[np.int64] = _windows(wanted, count) - int(wanted[mover.start : mover.stop].sum())
    return gained


def _movers(
    held: Sequence[Holder], blocks: int, added: Floats, at_most: int
) -> list[tuple[Holder, tuple[int, int] | None]]:
    """The servers whose moves are compared, each with the blocks that it must keep."""
    online = coverage((holder for holder in held if holder.online), blocks)
    found = []
    for holder in held:
        alone = [b for b in range(holder.start, min(holder.stop, blocks)) if online[b] == 1]
        if holder.online and len(alone) < holder.stop - holder.start:
            found.append((holder, (alone[0], alone[-1] + 1) if alone else None))
    if len(found) <= at_most:
        return found
    short = set(narrowest(added).blocks)
    busy = {h.peer for h, _ in found if not short.isdisjoint(range(h.start, h.stop))}
    found.sort(key=lambda f: (f[0].peer in busy, f[1] is not None, -f[0].rate, f[0].peer))
    return found[:at_most]


def _best_start(gains: Floats, mover: Holder, count: int, keep: tuple[int, int] | None, blocks: int) -> int:
    """The start of the window with the largest gain per block loaded; among equals the nearest."""
    first, last = (max(0, keep[1] - count), keep[0]) if keep else (0, blocks - count)
    options = np.arange(first, min(last, blocks - count) + 1)
    kept = np.minimum(mover.stop, options + count) - np.maximum(mover.start, options)
    worth = np.round(gains[options] / (MOVE_EFFORT + count - np.maximum(kept, 0)), 6)
    return int(options[np.lexsort((options, np.abs(options - mover.start), -worth))[0]])


def _effort(mover: Holder, start: int, count: int) -> float:
    """The effort of a move, in blocks that could be loaded meanwhile."""
    return MOVE_EFFORT + count - mover.blocks.overlap((start, start + count)).size


def _holes_after(number: NDArray[np.int64], mover: Holder, start: int, stop: int) -> int:
    after = number.copy()
    after[mover.start : mover.stop] -= 1
    after[start:stop] += 1
    return int((after == 0).sum())


def _windows(wanted: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """The number of wanted blocks in each window of `count`."""
    up_to = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
    inside: NDArray[np.int64] = up_to[count:] - up_to[: len(up_to) - count]
    return inside


def _single(added: Floats) -> Single:
    """In float32; entries that `reach` leaves undefined, p after b, are infinite."""
    before, block = np.ogrid[: added.shape[0], : added.shape[1]]
    return np.where(before > block, np.inf, added).astype(np.float32)


def _shortfalls(rest: Single, rate: float, speeds: Floats, counts: NDArray[np.int64]) -> Floats:
    """The shortfall of the worst set of blocks at `rate` tokens per second, with one server added.

    rest: for each case, `reach` of the other servers, from `_single`; shape (cases, blocks + 1, blocks).
    speeds, counts: of the server that is added in each case.
    Returns block-tokens per second by case and by the start of the server's window; infinite where no window
    starts.  The worst set either meets the window, and has the new server's help, or goes around the window:
    then the last block before the window and the first one after it are neighbours in the set.
    """
    cases, _, blocks = rest.shape
    until, onward = np.zeros((cases, blocks + 1), np.float32), np.zeros((cases, blocks + 1), np.float32)
    for b in range(blocks):
        until[:, b + 1] = (until[:, : b + 1] + rest[:, : b + 1, b]).min(axis=1) - rate
    for b in range(blocks - 2, -1, -1):
        step = rest[:, b + 1, b + 1 :] + onward[:, b + 2 :]
        onward[:, b + 1] = np.minimum(0.0, step.min(axis=1) - rate)
    around = rest + until[:, :, None]
    around += onward[:, None, 1:] - np.float32(rate)
    for p in range(1, blocks + 1):  # twice as fast as accumulate
        np.minimum(around[:, p], around[:, p - 1], out=around[:, p])
    for b in range(blocks - 2, -1, -1):
        np.minimum(around[:, :, b], around[:, :, b + 1], out=around[:, :, b])
    before, best = np.minimum.accumulate(until, axis=1), until.min(axis=1)
    lack = np.full((cases, blocks), np.inf)
    for case in range(cases):
        starts = np.arange(blocks - counts[case] + 1)
        stops = starts + counts[case]
        without = before[case, starts].astype(float)
        inner = stops < blocks
        without[inner] = np.minimum(without[inner], around[case, starts[inner], stops[inner]])
        lack[case, starts] = -np.minimum(without, best[case] + speeds[case])
    return lack
