"""A batch of hidden states as requests: checked, cut by rows, and what a client keeps of it.

Pure but for torch.  A row is never cut.  Deep prompts go with every request, those of its blocks alone; where
they leave no room in a frame, a hop is asked for fewer blocks at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from client.adapters.upload import AdapterUse
from client.session.terms import SessionPrompts, Terms
from node.model.checkpoint.info import ModelInfo
from node.runtime.values import shown
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.codecs import encode_hidden
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import WHOLE_CODECS, vector_bytes
from tensor_codec.messages.gradients import Summed

# Of all rows of one request, unless one row is longer: see client.generation.conversation.
REQUEST_POSITIONS = 512
# Of a request where a chain has several hops: while one works on its part the others wait, unless there are
# as many requests as these.  Products of fewer positions are slower (docs/decisions/0023-tapes.md).
LEAST_POSITIONS, MOST_POSITIONS = 128, 256
REQUESTS_PER_CALL = 8


@dataclass(frozen=True, slots=True)
class HopInput:
    """A hop and its input: enough to do its part again, there or elsewhere.

    tape: the id of the graph that the hop has kept of its forward; b"" where it has kept none.
    """

    hop: Hop
    hidden: Tensor
    tape: bytes = b""


class Sums(Protocol):
    """Where the gradients of a call's adapter are added: `client.adapters.sums.CallSums`."""

    def at(self, hop: Hop, number: int) -> Summed | None:
        """The sum at a hop, and the request's place in it; None where the hop's blocks have no site."""

    def confirmed(self, hop: Hop, part: Part, hidden: Tensor, grad: Tensor) -> None:
        """A hop has answered a request."""


@dataclass(slots=True)
class Part:
    """Some rows of a call, through blocks [start, stop).

    grad: of the loss at the output, for a backward.  prompts: of all rows, a row of them for each block.
    tensors: of its largest request, each of the size of `hidden`.  planned: the peers of its chain.
    adapter: of the call.  sums: of its gradients; number: of the part in them.
    """

    hidden: Tensor
    start: int
    stop: int
    grad: Tensor | None = None
    prompts: Tensor | None = None
    tensors: int = 1
    planned: tuple[PeerId, ...] = ()
    adapter: AdapterUse | None = None
    sums: Sums | None = None
    number: int = 0

    @property
    def positions(self) -> int:
        """Positions of all its rows."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def prompts_of(self, hop: Hop) -> Tensor | None:
        """The prompts of a hop's blocks, [blocks, positions, hidden]."""
        return None if self.prompts is None else self.prompts[hop.start - self.start : hop.stop - self.start]

    def divided(self, positions: int) -> list[Part]:
        """Parts of at most so many positions, or of one row each.

        The same part where its prompts, which go with every request, are larger than these positions.
        """
        batch, tokens, _ = self.hidden.shape
        rows = max(1, positions // tokens)
        if rows >= batch or (self.prompts is not None and self.prompts[..., 0].numel() > rows * tokens):
            return [self]
        parts = []
        for i in range(0, batch, rows):
            own = None if self.grad is None else self.grad[i : i + rows]
            parts.append(replace(self, hidden=self.hidden[i : i + rows], grad=own))
        return parts

    def begin_sums(self, sums: Sums, number: int) -> None:
        """Have the gradients of its adapter added there, under this number."""
        self.sums, self.number = sums, number

    def plan(self, peers: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
        """Take another chain; returns the peers of the one before."""
        before, self.planned = self.planned, peers
        return before


def positions_of_a_request(positions: int, hops: int) -> int:
    """Positions of a request of a call with so many positions, through so many hops.

    With one hop the largest; else small enough for REQUESTS_PER_CALL requests, so that all hops work at the
    same time, as in GPipe (arXiv:1811.06965).
    """
    if hops < 2:
        return REQUEST_POSITIONS
    return max(LEAST_POSITIONS, min(MOST_POSITIONS, positions // REQUESTS_PER_CALL))


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A part whose forward is done, and the input of each of its hops."""

    part: Part
    inputs: tuple[HopInput, ...]

    def again(self, grad: Tensor) -> Part:
        """The part for a backward."""
        part = self.part
        return replace(part, grad=grad, planned=())


@dataclass(slots=True, eq=False)
class KeptInputs:
    """The input of every server of a forward, so that a backward need not run the forward again.

    Made by `Swarm.forward_kept`; good for any number of backwards until `release`, or until the program drops
    it.  start, stop: the blocks.  shape: of the hidden states, [batch, tokens, hidden].  adapter: of that
    call, and of the backwards.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    _parts: tuple[KeptPart, ...] | None = field(repr=False)
    adapter: AdapterUse | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds: hidden states of all rows for each server.  0 after `release`."""
        return sum(each.hidden.nbytes for part in self._parts or () for each in part.inputs)

    def release(self) -> None:
        """Give the memory back, from any thread.  A later backward raises ValueError."""
        self._parts = None

    def parts(self) -> tuple[KeptPart, ...]:
        """The parts, in the order of their rows.  Raises ValueError after `release`."""
        parts = self._parts
        if parts is None:
            raise ValueError("these kept inputs were released, a backward needs them")
        return parts

    def follow(self, inputs: Sequence[Sequence[HopInput]]) -> None:
        """Ask these hops from now on: a server that was replaced in one backward is not asked in the next.

        inputs: of each part, in order.
        """
        parts = self._parts
        if parts is not None:
            pairs = zip(parts, inputs, strict=True)
            self._parts = tuple(KeptPart(each.part, tuple(hops)) for each, hops in pairs)


@dataclass(frozen=True, slots=True)
class BatchCutter:
    """Checks the tensors of a call, and cuts them into parts.

    codec: "fp32" or "bf16"; else each hop's own, which loses nothing.
    """

    info: ModelInfo
    limits: Limits
    codec: str

    def cut(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        *,
        grad: Tensor | None = None,
        prompts: Tensor | None = None,
        tensors: int = 1,
        first: int = 0,
    ) -> list[Part]:
        """The parts of a call.  tensors: of the largest request for a part, in hidden states.

        first: places of a prefix in front of every row.
        Runs in the torch thread.  Raises ValueError.
        """
        if not 0 <= start < stop <= self.info.blocks:
            raise ValueError(f"blocks {start}:{stop} of a model that has 0:{self.info.blocks}")
        hidden = self.checked("hidden", hidden, "batch, tokens")
        grad = None if grad is None else self.gradient(grad, hidden.shape)
        batch, tokens, _ = hidden.shape
        if first + tokens > self.info.max_position:
            after = f" after a prefix of {first}" if first else ""
            raise ValueError(f"rows of {tokens} positions{after}, the model has {self.info.max_position}")
        prompts = None if prompts is None else self.prompts(prompts, stop - start, tokens)
        rows = max(1, min(self._room(tokens, tensors, prompts), REQUEST_POSITIONS) // tokens)
        if first:
            rows = max(1, min(rows, self.limits.max_step_tokens // (first + tokens)))
        parts = []
        for i in range(0, batch, rows):
            own = None if grad is None else grad[i : i + rows]
            parts.append(Part(hidden[i : i + rows], start, stop, own, prompts, tensors))
        return parts

    def gradient(self, grad: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient for hidden states of this shape, in its form here.  Raises ValueError."""
        grad = self.checked("grad", grad, "batch, tokens")
        if list(grad.shape) != list(shape):
            raise ValueError(f"grad is {list(grad.shape)} and hidden {list(shape)}")
        return grad

    def checked(self, name: str, tensor: Tensor, axes: str) -> Tensor:
        """The tensor in its form here: on the CPU, in float32 or bfloat16.  Raises ValueError."""
        size = self.info.hidden_size
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {shown(tensor)}, a tensor of torch is needed")
        if tensor.dim() != 3 or tensor.shape[2] != size or not tensor.numel():
            raise ValueError(f"{name} is {list(tensor.shape)}, [{axes}, {size}] is needed")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}, a float dtype is needed")
        dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
        kept = tensor.detach().to("cpu", dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        return kept

    def max_positions(self, codec: str, tensors: int, vectors: int = 0) -> int:
        """The largest number of positions, of all rows, in one request.

        vectors: of the prompts in it, each of a hidden state's size.
        """
        room = max(0, self._vectors(codec) - vectors) // tensors
        return min(self.limits.max_step_tokens, room)

    def pieces(self, hop: Hop, part: Part, codec: str) -> list[Hop]:
        """The requests for a hop's blocks, in order: one, unless the frames have no room for its prompts."""
        if part.prompts is None:
            return [hop]
        left = self._vectors(codec) - part.tensors * part.positions
        blocks = max(1, left // part.prompts.shape[1])
        starts = range(hop.start, hop.stop, blocks)
        return [Hop(hop.peer, start, min(start + blocks, hop.stop)) for start in starts]

    def _vectors(self, codec: str) -> int:
        """How many vectors of a hidden state's size fit into a frame."""
        limits = self.limits
        return (limits.max_frame_bytes - 2 * limits.max_header_bytes) // (
            vector_bytes(codec, self.info.hidden_size)
        )

    def prompts(self, prompts: Tensor, blocks: int, tokens: int) -> Tensor:
        """Deep prompts for rows of `tokens` positions, in their form here.  Raises ValueError."""
        prompts = self.checked("prompts", prompts, "blocks, positions")
        if len(prompts) != blocks:
            raise ValueError(f"prompts is {list(prompts.shape)} for {blocks} blocks")
        if prompts.shape[1] > tokens:
            raise ValueError(f"prompts of {prompts.shape[1]} positions for rows of {tokens}")
        return prompts

    def for_session(self, prompts: Tensor, terms: Terms) -> SessionPrompts:
        """Deep prompts for all hops of a session.  Runs in the torch thread.  Raises ValueError."""
        own = self.prompts(prompts, terms.run.size, terms.max_length)
        codec = terms.kept_codec
        return SessionPrompts(own.shape[1], terms.run, codec, encode_hidden(own, codec))

    def _room(self, tokens: int, tensors: int, prompts: Tensor | None) -> int:
        """Positions of one request.  Raises ValueError where one row has no room.

        With the hops' own codec a long row may still fit at two bytes a value.  Prompts of all blocks get
        up to half of a frame; where a row has no room next to them, they go block by block.
        """
        codecs = (self.codec,) if self.codec in WHOLE_CODECS else ("fp32", "bf16")
        room: list[int] = []
        for codec in codecs:
            vectors = [0]
            if prompts is not None:
                blocks, own = prompts.shape[:2]
                vectors = [min(blocks * own, max(own, self._vectors(codec) // 2)), own]
            room += [self.max_positions(codec, tensors, each) for each in vectors]
        found = next((each for each in room if tokens <= each), None)
        if found is None:
            beside = f" and prompts of {prompts.shape[1]} positions" if prompts is not None else ""
            raise ValueError(
                f"rows of {tokens} positions, {max(room)} fit into one request of {tensors} x"
                f" {self.info.hidden_size} values a position{beside} (max_step_tokens is"
                f" {self.limits.max_step_tokens}, max_frame_bytes {self.limits.max_frame_bytes})"
            )
        return found
