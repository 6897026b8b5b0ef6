"""What a batch will cost: a small model of the hardware, learned from the batches that it runs."""

from __future__ import annotations

from dataclasses import dataclass

LEARNING = 0.2  # of a prediction's error is mended by each batch
FEW_POSITIONS = 4  # a batch of so many positions tells as much about its fixed cost as about a position's
HICCUP = 4.0  # a batch that takes longer than so many times the prediction counts as that
MIN_SECONDS = 1e-9  # of either part of a cost: a prediction is never 0 and grows with the work


@dataclass(slots=True)
class Cost:
    """Seconds that a batch takes: `per_block` for each block that it runs, `per_position` for its work."""

    per_block: float
    per_position: float

    def seconds(self, blocks: int, work: int) -> float:
        """What `blocks` blocks with `work` positions in all of them together will take."""
        return self.per_block * blocks + self.per_position * work

    def learn(self, blocks: int, work: int, seconds: float) -> None:
        """Move what this batch was predicted to take towards what it took.

        The smallest change of the two parts that mends `LEARNING` of the error (normalised least mean
        squares, Widrow and Hoff).  Unlike a fit over past batches it has no trouble with a load that
        never varies.  A position is weighed so that small batches teach about the fixed part: from
        rows of one token nothing can be known about chunks.
        """
        predicted = self.seconds(blocks, work)
        wide = work / FEW_POSITIONS
        gain = LEARNING * (min(seconds, HICCUP * predicted) - predicted) / (blocks**2 + wide**2)
        self.per_block = max(MIN_SECONDS, self.per_block + gain * blocks)
        self.per_position = max(MIN_SECONDS, self.per_position + gain * wide / FEW_POSITIONS)
