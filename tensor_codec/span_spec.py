"""Which blocks of which model, computed how: what a server serves, and what a client asks for."""

from __future__ import annotations

from dataclasses import dataclass

from tensor_codec.blocks import Blocks
from tensor_codec.errors import WrongRevision

DTYPES = ("float32", "bfloat16", "float16")  # that a span computes in
QUANTIZE = ("none", "int8", "nf4")  # how a span keeps its matrices


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """A span as both ends name it.

    model: a name for people; revision: a hash of the model's content, by which it is known.
    dtype: one of DTYPES.  adapter: a LoRA adapter by name, or None for the plain model.
    A server says three more, and a client that asks leaves them out: quantize: one of QUANTIZE; hidden:
    values of a position's hidden state; max_position: positions that the model has.
    """

    model: str
    revision: str
    blocks: Blocks
    dtype: str
    adapter: str | None = None
    quantize: str = ""
    hidden: int = 0
    max_position: int = 0

    def admits(self, asked: SpanSpec) -> None:
        """Raise WrongRevision unless a server of this span can compute what is asked for."""
        if asked.revision != self.revision:
            raise WrongRevision(
                f"revision {asked.revision} of {asked.model} was asked for,"
                f" {self.revision} of {self.model} is served here"
            )
        if asked.dtype != self.dtype:
            raise WrongRevision(f"dtype {asked.dtype} was asked for, {self.dtype} is served here")
        if not self.blocks.contains(asked.blocks):
            raise WrongRevision(f"blocks {asked.blocks} were asked for, {self.blocks} are served here")
        if asked.adapter is not None and asked.adapter != self.adapter:
            raise WrongRevision(
                f"adapter {asked.adapter} was asked for, {self.adapter or 'none'} is served here"
            )
