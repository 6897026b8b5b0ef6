"""One-token steps as CUDA graphs: launched as one, instead of some hundred kernels one after the other.

A graph is a recording of kernels with their addresses, so inputs lie in buffers of its own and shapes are
fixed.  Rows and lengths are therefore rounded up to buckets.  Padding rows write to the page that belongs
to no row, and padding positions are masked.  A graph is made when its bucket is used for the second time.
The least recently used graph is dropped when there are too many.

A kernel that allocates or syncs with the host cannot be recorded.  After one failure the span computes
without graphs, and the log says so.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger("raceme")

MIN_LENGTH = 64  # positions in the smallest bucket
MAX_GRAPHS = 32  # each keeps its activations: some MiB
SEEN_BEFORE = 1  # uses of a bucket before it is worth recording

# hidden [rows, hidden_size], positions before each row, slot to write of each row, slots to read
# [rows, longest] -> hidden [rows, hidden_size]
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Capture = Callable[[Run, "Inputs"], Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a step, in buffers of fixed addresses."""

    hidden: Tensor
    places: Tensor
    write: Tensor
    read: Tensor

    def run(self, run: Run) -> Tensor:
        """Run the step over these inputs."""
        return run(self.hidden, self.places, self.write, self.read)


def bucket(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`; `least` is a power of two."""
    return max(least, 1 << (number - 1).bit_length())


def padded(inputs: Inputs, nobodys_slot: int) -> Inputs:
    """The inputs padded to the size of their bucket."""
    rows, longest = inputs.read.shape
    more_rows, more = bucket(rows) - rows, bucket(longest, MIN_LENGTH) - longest
    return Inputs(
        functional.pad(inputs.hidden, (0, 0, 0, more_rows)),
        functional.pad(inputs.places, (0, more_rows)),
        functional.pad(inputs.write, (0, more_rows), value=nobodys_slot),
        functional.pad(inputs.read, (0, more, 0, more_rows), value=nobodys_slot),
    )


@dataclass(slots=True)
class _Graph:
    inputs: Inputs
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """The graphs of one span over one page pool.

    capture: records a step over inputs and answers a function that replays the step.
    """

    def __init__(self, nobodys_slot: int, capture: Capture | None = None) -> None:
        self._nobodys_slot = nobodys_slot
        self._capture = capture or cuda_graph
        self._graphs: OrderedDict[tuple[int, int, int, int], _Graph] = OrderedDict()
        self._seen: dict[tuple[int, int, int, int], int] = {}
        self._works = True

    def run(self, run: Run, part: tuple[int, int], inputs: Inputs) -> Tensor:
        """The step, by a graph where there is one.  part: the run of blocks that `run` computes."""
        rows = len(inputs.hidden)
        wide = padded(inputs, self._nobodys_slot)
        key = (*part, *wide.read.shape)
        graph = self._graphs.get(key) or self._made(run, key, wide)
        if graph is None:
            return inputs.run(run)
        self._graphs.move_to_end(key)
        for name in ("hidden", "places", "write", "read"):
            getattr(graph.inputs, name).copy_(getattr(wide, name))
        return graph.replay()[:rows].clone()

    def _made(self, run: Run, key: tuple[int, int, int, int], wide: Inputs) -> _Graph | None:
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if not self._works or seen <= SEEN_BEFORE:
            return None
        own = Inputs(wide.hidden.clone(), wide.places.clone(), wide.write.clone(), wide.read.clone())
        try:
            graph = _Graph(own, self._capture(run, own))
        except RuntimeError as error:
            log.warning("decode steps run without CUDA graphs: %s", str(error).split("\n")[0])
            self._works = False
            self._graphs.clear()
            return None
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


def cuda_graph(run: Run, inputs: Inputs) -> Callable[[], Tensor]:
    """Record a step on the current CUDA device.  Raises RuntimeError where it cannot be recorded."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        inputs.run(run)  # once without recording: libraries initialise
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = inputs.run(run)

    def replay() -> Tensor:
        graph.replay()
        return answer

    return replay
