"""The gradients of an adapter in one backward: summed at the servers, collected, exact whatever died.  Pure.

Each hop adds up the gradients of its requests.  A sum is taken whole, and only if the requests in it are
those that were confirmed here; else all of its requests are asked for again.  The client has what that takes:
the inputs of every hop, and the gradients that it sent.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.batch_parts import Part
from routing.chains.hops import Hop
from tensor_codec.adapters import ADAPTER_DTYPES, AdapterContent
from tensor_codec.messages.gradients import MAX_SUMMED, SUM_BYTES, SUM_DTYPES, Summed

_TORCH = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(slots=True, eq=False)
class HopSum:
    """The sum of one run of blocks at one hop.  done: by number, what each request in it was."""

    hop: Hop
    name: bytes
    done: dict[int, tuple[Part, Tensor, Tensor]] = field(default_factory=dict)


@dataclass(slots=True)
class CallSums:
    """The sums of one call.

    Promises, checked by tests/unit/test_call_sums.py:
      * a request counts once, wherever and however often it was computed;
      * the result does not depend on the hops that the requests went to.
    """

    content: AdapterContent
    _open: dict[Hop, HopSum] = field(default_factory=dict)
    _collected: list[tuple[HopSum, Tensor]] = field(default_factory=list)

    def at(self, hop: Hop, number: int) -> Summed | None:
        """Where a hop adds the gradients of request `number`; None where none of its blocks has a site.

        Raises ValueError for more requests than a sum holds.
        """
        if not self.values_of(hop):
            return None
        if number >= MAX_SUMMED:
            raise ValueError(
                f"a backward of more than {MAX_SUMMED} requests with an adapter: give it fewer rows"
            )
        if hop not in self._open:
            self._open[hop] = HopSum(hop, os.urandom(SUM_BYTES))
        return Summed(self._open[hop].name, number)

    def confirmed(self, hop: Hop, part: Part, hidden: Tensor, grad: Tensor) -> None:
        """A hop has answered a request, given `hidden` and `grad`."""
        if hop in self._open:
            self._open[hop].done[part.number] = part, hidden, grad

    def to_collect(self) -> list[tuple[HopSum, str]]:
        """The sums that are still at hops, each with its dtype for the wire.

        In float64 where several sums have the same block: so their total is the same in every bit.
        """
        counts = Counter(
            block
            for each in (*self._open.values(), *(done for done, _ in self._collected))
            for block in range(*each.hop.blocks)
        )
        self._open = {hop: each for hop, each in self._open.items() if each.done}
        return [
            (each, "fp64" if any(counts[block] > 1 for block in range(*each.hop.blocks)) else "fp32")
            for each in self._open.values()
        ]

    def take(self, own: HopSum, dtype: str, numbers: frozenset[int], data: bytes) -> bool:
        """Take a collected sum; False where other requests are in it than were confirmed."""
        if numbers != own.done.keys():
            return False
        del self._open[own.hop]
        self._collected.append((own, torch.frombuffer(bytearray(data), dtype=_TORCH[dtype])))
        return True

    def again(self, lost: HopSum) -> list[Part]:
        """The requests of a sum that is lost, to be asked for once more."""
        if self._open.get(lost.hop) is lost:
            del self._open[lost.hop]
        hop = lost.hop
        return [
            Part(
                hidden, hop.start, hop.stop, grad, part.prompts_of(hop), part.tensors,
                adapter=part.adapter, sums=self, number=number,
            )
            for number, (part, hidden, grad) in sorted(lost.done.items())
        ]  # fmt: skip

    def total(self) -> Mapping[int, Tensor]:
        """For each block with sites the gradient of its blob's values, in their order: float32.

        Runs in the torch thread.
        """
        found: dict[int, Tensor] = {}
        in_order = sorted(self._collected, key=lambda each: (min(each[0].done), each[0].hop.peer))
        for own, values in in_order:
            at = 0
            for block in range(*own.hop.blocks):
                size = self._values(block)
                if size:
                    part = values[at : at + size]
                    found[block] = found[block] + part if block in found else part
                at += size
        return {block: found[block].float() for block in sorted(found)}

    def values_of(self, hop: Hop) -> int:
        """Numbers in the sum of a hop."""
        return sum(self._values(block) for block in range(*hop.blocks))

    def bytes_of(self, hop: Hop, dtype: str) -> int:
        """Bytes of the sum of a hop on the wire."""
        return self.values_of(hop) * SUM_DTYPES[dtype]

    def _values(self, block: int) -> int:
        return len(self.content.blobs[block]) // ADAPTER_DTYPES[self.content.manifest.dtype]
