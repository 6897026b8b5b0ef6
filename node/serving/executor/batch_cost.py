"""Predicts the seconds of a batch: a small model of the hardware, learned from the batches that it ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field

from node.serving.executor.jobs import Batch, Job, Kind, Piece, run_of

LEARNING = 0.2  # part of a prediction's error that each batch corrects
FEW_POSITIONS = 4  # a batch of this many positions teaches as much about its fixed cost as about a position's
OUTLIER_FACTOR = 4.0  # a batch counts as at most this many times its expected seconds
# Positions of a short chunk, at most: where a position costs little beside the pass over the weights, a chunk
# of a few takes as long as one of these.
LEAST_CHUNK_POSITIONS = 16
MIN_SECONDS = 1e-9  # of either part of a cost: a prediction is never 0 and grows with the work


@dataclass(slots=True)
class Cost:
    """Seconds that a batch takes: `per_block` for each block that it runs, `per_position` for its work."""

    per_block: float
    per_position: float

    def seconds(self, blocks: float, work: float) -> float:
        """The prediction for `blocks` blocks and `work` positions, added up over these blocks."""
        return self.per_block * blocks + self.per_position * work

    def learn(self, blocks: float, work: float, seconds: float) -> None:
        """Correct the prediction for this batch by a part of its error.

        The smallest change of both figures that corrects `LEARNING` of the error (normalised least mean
        squares, Widrow and Hoff).  Unlike a fit over past batches it works with a load that never varies.
        The weight of positions is scaled so that small batches teach about the fixed part: batches of one
        token say nothing about chunks.
        """
        predicted = self.per_block * blocks + self.per_position * work
        wide = work / FEW_POSITIONS
        gain = LEARNING * (min(seconds, OUTLIER_FACTOR * predicted) - predicted) / (blocks**2 + wide**2)
        self.per_block = max(MIN_SECONDS, self.per_block + gain * blocks)
        self.per_position = max(MIN_SECONDS, self.per_position + gain * wide / FEW_POSITIONS)


@dataclass(slots=True)
class BatchCosts:
    """Predictions for batches of each kind, and the time from which a batch is long.

    joint_slowdown: times a decode step of one row; a batch that takes longer is long.
    single: seconds of a block for one position alone.  A row alone often takes a way through the hardware of
    its own, so it teaches nothing about batches: on some CPUs two rows take twice as long, and five no longer
    than two.
    """

    decode_seconds_per_block: InitVar[float]
    prefill_seconds_per_block_token: InitVar[float]
    joint_slowdown: float
    of: dict[Kind, Cost] = field(init=False)
    single: float = field(init=False)

    def __post_init__(self, decode_seconds_per_block: float, prefill_seconds_per_block_token: float) -> None:
        per_position = prefill_seconds_per_block_token
        fixed = max(decode_seconds_per_block - per_position, MIN_SECONDS)
        self.of = {kind: Cost(fixed, per_position) for kind in Kind}
        self.single = fixed + per_position

    def learn(self, kind: Kind, blocks: float, work: float, seconds: float) -> None:
        """Correct the predictions by a batch: see `Cost.learn`."""
        alone = work < blocks * (1 + 1e-9)  # equal, but for the rounding of an adapter's weight
        if not alone or kind is Kind.STATELESS:
            self.of[kind].learn(blocks, work, seconds)
        if kind is Kind.DECODE and (alone or seconds < self.single * blocks):  # more rows are no faster
            self.single += LEARNING * (min(seconds / blocks, OUTLIER_FACTOR * self.single) - self.single)
            self.single = max(MIN_SECONDS, self.single)

    def one_row(self, blocks: int) -> float:
        """Seconds of a decode step of one row through this many blocks: the measure of every wait."""
        return self.single * blocks

    def least_row(self, pieces: Iterable[Piece]) -> float:
        """Seconds of a step of one row, through the blocks of the piece with the fewest."""
        return min(self.one_row(piece.job.stop - piece.job.start) for piece in pieces)

    def is_long(self, job: Job) -> bool:
        """Whether the job's smallest piece alone takes longer than a shared batch may."""
        if job.rows == 1 and job.tokens == 1 and job.kind is Kind.DECODE:
            return False  # the measure itself
        start, stop = job.parts[0] if job.parts else (job.start, job.stop)
        tokens = min(job.tokens, self.least_chunk(job.rows)) if job.kind is Kind.PREFILL else job.tokens
        positions = job.rows * tokens
        blocks = (stop - start) * job.weight
        seconds = self.of[job.kind].seconds(blocks, blocks * positions)
        return seconds > self.joint_slowdown * self.one_row(stop - start)

    def least_chunk(self, rows: int) -> int:
        """Tokens a row of the shortest chunk: its positions take as long as the pass over the weights."""
        cost = self.of[Kind.PREFILL]
        return max(1, int(min(LEAST_CHUNK_POSITIONS, cost.per_block / cost.per_position)) // rows)

    def stateless_seconds(self, job: Job) -> float:
        """Seconds of a whole stateless request."""
        parts = job.parts or ((job.start, job.stop),)
        blocks = sum(stop - start for start, stop in parts) * job.weight
        return self.of[Kind.STATELESS].seconds(blocks, blocks * job.rows * job.tokens)

    def shares(self, batch: Batch, works: Sequence[float]) -> list[float]:
        """The part of a batch's seconds that each piece is charged with; together 1.

        In proportion to the work; and to each its own adapter, which the batch reads for it.
        """
        cost, work, runs = self.of[batch[0].job.kind], sum(works), [run_of(piece) for piece in batch]
        common = cost.seconds(len({block for run in runs for block in range(*run)}), work) / work
        seconds = [
            common * own + cost.per_block * (piece.job.weight - 1) * (stop - start)
            for piece, own, (start, stop) in zip(batch, works, runs, strict=True)
        ]
        return [each / sum(seconds) for each in seconds]

    def next_slowdown(self, positions: int) -> float:
        """The time of a decode batch of this many positions and one more, against one row's.

        At most `joint_slowdown`.
        """
        if not positions:
            return 1.0
        return min(self.joint_slowdown, self.of[Kind.DECODE].seconds(1, 1 + positions) / self.single)
