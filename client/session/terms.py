"""The terms of a session for every hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from routing.blocks import Blocks
from tensor_codec.errors import Refused
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import VALUE_BYTES, WHOLE_CODECS

if TYPE_CHECKING:
    from client.adapters.upload import AdapterUse
    from node.model.blocks.rope import LengthRope


@dataclass(frozen=True, slots=True)
class SessionPrompts:
    """Deep prompts of a session: each block adds its own to its input at the first `positions`.

    run: the blocks.  codec, body: [blocks, positions, hidden], those of all blocks.
    """

    positions: int
    run: Blocks
    codec: str
    body: Buffer

    @property
    def hidden(self) -> int:
        """Values of each vector."""
        return len(self.body) // (self.run.size * self.positions * VALUE_BYTES[self.codec])

    def body_for(self, blocks: Blocks, codec: str, limits: Limits) -> Buffer:
        """The prompts of these blocks in a codec.  Raises Refused where a frame has no room for them."""
        from tensor_codec.codecs import recode  # not at the start: the core of a session needs no torch

        own = recode(self._of(blocks), self.codec, codec, self.hidden)
        room = limits.max_frame_bytes - 2 * limits.max_header_bytes
        if len(own) > room:
            raise Refused(
                f"prompts of {len(own)} bytes for blocks {blocks}, a frame has room for {room}"
                " (max_frame_bytes)"
            )
        return own

    def seconds_for(self, blocks: Blocks, limits: Limits) -> float:
        """Time to send the prompts of these blocks, a part of a hop's opening."""
        return len(self._of(blocks)) / limits.frame_floor_bytes_per_second

    def _of(self, blocks: Blocks) -> Buffer:
        size = len(self.body) // self.run.size
        first, last = ((block - self.run.start) * size for block in blocks)
        return memoryview(self.body)[first:last]


@dataclass(frozen=True, slots=True)
class Terms:
    """The model, the blocks, the size and the codec of a session.

    run: the blocks that the session goes through.  max_length: positions of each of the `batch` rows.
    codec: of hidden states: "fp32" or "bf16"; "auto" or "exact", which lose nothing of the present hops; or
    "fast", which may lose where a link is slow.
    rope: the model's angles that depend on a sequence's length; None without them.  prompts: every hop gets
    those of its blocks when it is opened.  adapter: of all blocks; a hop has it before it is opened.
    standby: every hop gets one, where there is another peer with its blocks.
    """

    model: str
    revision: str
    run: Blocks
    hidden: int
    batch: int
    max_length: int
    codec: str
    rope: LengthRope | None = None
    prompts: SessionPrompts | None = None
    adapter: AdapterUse | None = None
    standby: bool = False

    @property
    def kept_codec(self) -> str:
        """The codec of the client's own journal: the exact one, where later hops may need it."""
        return self.codec if self.codec in WHOLE_CODECS else "fp32"

    @property
    def adapter_name(self) -> str | None:
        """By which hops are asked for the adapter; None without one."""
        return None if self.adapter is None else self.adapter.name

    @property
    def cache_tokens(self) -> int:
        """Positions of all rows: the most that a hop's cache may have to hold."""
        virtual_tokens = 0 if self.adapter is None else self.adapter.virtual_tokens
        return self.batch * (virtual_tokens + self.max_length)
