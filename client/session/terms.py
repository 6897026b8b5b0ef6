"""The terms of a session for every hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from routing.blocks import Blocks

if TYPE_CHECKING:
    from node.model.blocks.rope import LengthRope


@dataclass(frozen=True, slots=True)
class Terms:
    """The model, the blocks, the size and the codec of a session.

    run: the blocks that the session goes through.  max_length: positions of each of the `batch` rows.
    codec: of hidden states: "fp32" or "bf16", or "auto", which is exact for the present hops.
    rope: the model's angles that depend on a sequence's length; None without them.
    """

    model: str
    revision: str
    run: Blocks
    hidden: int
    batch: int
    max_length: int
    codec: str
    rope: LengthRope | None = None

    @property
    def kept_codec(self) -> str:
        """The codec of the client's own journal: the exact one, where later hops may need it."""
        return "fp32" if self.codec == "auto" else self.codec

    @property
    def cache_tokens(self) -> int:
        """Positions of all rows: the most that a hop's cache may have to hold."""
        return self.batch * self.max_length
