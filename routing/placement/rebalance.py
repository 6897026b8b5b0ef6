"""Which blocks should a server hold?  The swarm's capacity decides: `routing.placement.throughput`.

What counts, in this order: no block that nobody holds; then capacity; then `min_replicas` holders of
each block; then short chains, which come of spans that begin where others end.

Capacity alone says too little on the way: one bottleneck hides the next, and most single moves do not
change it at all.  So moves lower the *shortfall*: the rate that the blocks lack, in the worst set of
them, where each asks for a given share of the bound, added up over a few such shares.  It is 0 exactly
where the capacity is at the highest of them, and every move lowers it, so moves come to an end.  What
few blocks lack is little of the swarm's work, and still limits all of it: once the capacity is good, one
demand is looked at, just above what is aimed at, and a move that takes half of its shortfall is made.

A server takes as many blocks as its memory holds, however slow it is: more blocks never lower the
capacity, since a server shares its work among its blocks as the others leave it to do, and they make
chains shorter.  `--num-blocks` is for who wants to load fewer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from routing.blocks import Blocks, coverage
from routing.names import PeerId
from routing.placement.cover_gaps import MOVE_EFFORT
from routing.placement.throughput import Floats, Holder, bound, capacity, ends, narrowest, reach
from routing.view.records import Record

Single = NDArray[np.float32]

# A swarm at this share of its bound rests: the last percent is not worth anybody's loading blocks.
QUALITY = 0.99
MIN_REPLICAS = 2
LEVELS = (0.5, 0.75, 0.9, 1.0)  # of the bound: the demands at which the shortfall is looked at
PLAUSIBLE = 3.0  # times the upper quartile of the claimed rates: so much is believed
ALIKE = 1e-4  # of the swarm's work: by less two windows of a joining server do not differ
MIN_GAIN = 0.002  # of the swarm's work, summed over the levels: a move for less is not made
MIN_SHARE = 0.5  # of the shortfall, once the capacity is good: a move for it is made, however little it is
LARGE_GAIN = 0.01  # a move for more is made together with the next best one
MAX_AT_ONCE = 4
GOOD = 0.9  # of the bound: from here on replicas count beside the capacity, and it stays at that
REPLICA_WORTH = 0.001  # of the same, for each holder that a block has too few
REPLICA_HINT = 1e-6  # while the capacity is too low: it decides between equals
MAX_MOVERS = 32  # servers whose moves are compared, at all levels; decides how long a decision takes
_RANK_CHANCE = 0.25  # who is next to the best moves with this chance, in case the best one cannot


def throughputs(spans: Sequence[Record], blocks: int) -> tuple[float, ...]:
    """Decode steps per second that the peers of each block can do together, by what they announce."""
    total = [0.0] * blocks
    for holder in holders(spans):
        for block in range(holder.start, min(holder.stop, blocks)):
            total[block] += holder.rate
    return tuple(total)


def holders(spans: Sequence[Record]) -> list[Holder]:
    """What these peers hold and how fast they are, in the order of their ids.

    A peer that has not measured its rate counts as the median of those that have; where none has,
    as one block per second: what matters is which blocks are held at all.  What claims are worth,
    `plausible` says.
    One that is about to move counts where it is going, and not as online: nobody relies on what it leaves.
    """
    rates = plausible({s.peer: 1.0 / s.seconds_per_block for s in spans if s.seconds_per_block > 0})
    usual = sorted(rates.values())[len(rates) // 2] if rates else 1.0
    return [
        Holder(
            s.peer,
            s.next_start if s.moves else s.start,
            s.next_stop if s.moves else s.stop,
            rates.get(s.peer, usual),
            s.state == "online" and not s.moves,
        )
        for s in sorted(spans, key=lambda s: s.peer)
    ]


def plausible(claims: Mapping[PeerId, float]) -> dict[PeerId, float]:
    """The rate at which each peer counts where it claims this one.

    Claims count in full up to PLAUSIBLE times their upper quartile: a cap by the median would take from
    honest fast servers what the capacity is made of.  Beyond, a peer counts the less the more it claims,
    down to the median, so that exaggeration does not pay.
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
) -> Blocks:
    """The window of `count` blocks that a joining server takes: `best_window` of records.

    spans: of the same model revision, joining peers too.
    seconds_per_block: the server's own; 0 where it has not measured, then it counts as the median.
    """
    held = holders(spans)
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

    A count above `blocks` gives them all.  Ties go to the lowest start, or to chance where `rng` is
    given: of servers that start at the same moment and do not yet see each other, fewer then choose
    alike.  O(blocks**2).  Raises ValueError for a count below 1.
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
    spare = _windows(number < min_replicas, count)
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


class Move(NamedTuple):
    """A server's best move: what it gains, in shares of the swarm's work, and the new window.

    rank: 0 for those that are made at once; the others are for where one of these is not made.
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

    held: of every server, this one among them; who announced a move counts where it will be.
    quality: at this share of the bound nobody moves for the capacity.

    Every server works out the same moves (`moves`).  Those of rank 0 are made; one of rank 1 with a chance
    of one in four, of rank 2 with one of 16, so that the swarm does not wait for a server that is pinned
    or gone.
    """
    if not any(holder.peer == me for holder in held):
        return None
    found = moves(held, blocks, quality=quality, counts={me: count}, min_replicas=min_replicas)
    return in_turn(found, me, rng)


def in_turn(ranked: Sequence[Move], me: PeerId, rng: random.Random) -> Blocks | None:
    """The window of this server's move, where chance, by its rank, lets it move now."""
    for move in ranked:
        if move.peer == me:
            return move.blocks if rng.random() < _RANK_CHANCE**move.rank else None
    return None


def moves(
    held: Sequence[Holder],
    blocks: int,
    *,
    quality: float = QUALITY,
    counts: dict[PeerId, int] | None = None,
    min_replicas: int = MIN_REPLICAS,
) -> list[Move]:
    """Moves that are worth their while: a few to be made at once, then the best of each other server.

    counts: blocks that a server has room for, where known; else those that it holds.
    Those of rank 0 are the best move, the best after it, and so on, at most MAX_AT_ONCE.  No block
    loses its last online holder, in whatever order they are made.  O(MAX_MOVERS * blocks**2).
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
    held = sorted(held, key=lambda h: h.peer)  # one order of adding: one result for everybody
    most, added = bound(held, blocks), reach(held, blocks)
    number = np.array(coverage(held, blocks))
    if not held:
        return []
    now_able = narrowest(added).capacity if number.min() > 0 else 0.0
    enough = min(quality, GOOD) * most  # of capacity, for replicas to count beside it
    good = 0 < enough <= now_able
    last = good and now_able < quality * most  # the last few percent: a small set of blocks may lack them
    if good and not last and number.min() >= min_replicas:
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
        more = _replicas_gained(number, mover, room[row], min_replicas)
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
    """What is held when a move has been announced."""
    return [
        h._replace(start=move.start, stop=move.stop, online=False) if h.peer == move.peer else h for h in held
    ]


def _replicas_gained(
    number: NDArray[np.int64], mover: Holder, count: int, min_replicas: int
) -> NDArray[np.int64]:
    """By window, how many holders fewer are missing when this server moves there."""
    without = number.copy()
    without[mover.start : mover.stop] -= 1
    wanted = without < min_replicas
    gained: NDArray[np.int64] = _windows(wanted, count) - int(wanted[mover.start : mover.stop].sum())
    return gained


def _movers(
    held: Sequence[Holder], blocks: int, added: Floats, at_most: int
) -> list[tuple[Holder, tuple[int, int] | None]]:
    """The servers whose moves are looked at, each with the blocks that it must keep."""
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
    """Where a mover's window gains most for the blocks to load; among equals, as near as can be."""
    first, last = (max(0, keep[1] - count), keep[0]) if keep else (0, blocks - count)
    options = np.arange(first, min(last, blocks - count) + 1)
    kept = np.minimum(mover.stop, options + count) - np.maximum(mover.start, options)
    worth = np.round(gains[options] / (MOVE_EFFORT + count - np.maximum(kept, 0)), 6)
    return int(options[np.lexsort((options, np.abs(options - mover.start), -worth))[0]])


def _effort(mover: Holder, start: int, count: int) -> float:
    """What a move takes, as the blocks that could be loaded meanwhile."""
    return MOVE_EFFORT + count - mover.blocks.overlap((start, start + count)).size


def _holes_after(number: NDArray[np.int64], mover: Holder, start: int, stop: int) -> int:
    after = number.copy()
    after[mover.start : mover.stop] -= 1
    after[start:stop] += 1
    return int((after == 0).sum())


def _windows(wanted: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """How many wanted blocks each window of `count` has."""
    up_to = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
    inside: NDArray[np.int64] = up_to[count:] - up_to[: len(up_to) - count]
    return inside


def _single(added: Floats) -> Single:
    """Half the memory; and the set that `reach` leaves undefined, p after b, costs infinitely much."""
    before, block = np.ogrid[: added.shape[0], : added.shape[1]]
    return np.where(before > block, np.inf, added).astype(np.float32)


def _shortfalls(rest: Single, rate: float, speeds: Floats, counts: NDArray[np.int64]) -> Floats:
    """What the worst set of blocks lacks at `rate` tokens per second with one server more.

    rest: of each case, `reach` of the other servers, from `_single`; shape (cases, blocks + 1, blocks).
    speeds, counts: of the server that is added in each case.
    Returns block-tokens per second by case and by the start of its window; infinite where no window
    starts.  The worst set either meets the window, and has the new server's help, or goes around it:
    then its last block before the window and its first after it are neighbours in the set.
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
