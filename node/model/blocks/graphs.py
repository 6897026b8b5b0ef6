"""One-token steps as CUDA graphs: launched as one, instead of some hundred kernels one after the other.

A graph is a recording of kernels with their addresses, so the inputs lie in bytes of its own
(`node.model.blocks.device.staging.Layout`) and shapes are fixed.  Rows are rounded up to powers of two, and
pages to the width of the table, which doubles when a row outgrows it.  Lengths are numbers on the device and
no shapes, so graphs differ by their rows alone as long as the table is wide enough.  Rows that are not there
see one position of the page that belongs to no row, and write to it.

All graphs of a span and a page pool share one pool of memory.  The largest is recorded first, and the others
fit into its place: two graphs never run at the same time, and an answer is copied before the next step.

A kernel that allocates or syncs with the host cannot be recorded.  After one such failure the span computes
without graphs, and the log says so.  A lack of memory says nothing about graphs: the step runs without one
then, and recording is tried again later.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from node.devices import is_out_of_memory
from node.model.blocks.device.staging import Inputs, Layout
from node.model.cuda.launches import side_stream

log = logging.getLogger("raceme")

MAX_ROWS = 256  # of a step with a graph
ROWS = tuple(1 << power for power in range(MAX_ROWS.bit_length()))  # of the graphs
MAX_GRAPHS = 64  # all rows for seven widths of tables or runs of blocks
SEEN_BEFORE = 1  # uses of a graph before it is worth recording
USES_AFTER_NO_MEMORY = 1024  # before recording is tried again
USES_AFTER_DROPPING = 64  # of a graph, before it is recorded again: a recording takes some steps' time

Step = Callable[[Inputs], Tensor]  # its answer: hidden states [rows, hidden_size]
Fill = Callable[[Tensor], None]  # writes a step's inputs into bytes on the device
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]  # records a step; replays it
Key = tuple[int, int, int, int]  # the run of blocks, rows, pages


@dataclass(slots=True)
class _Graph:
    content: Tensor
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """The graphs of one span over one page pool.

    new_capture: a function that records a step and answers a function that replays it; called once for all
    graphs that share memory.
    """

    def __init__(self, device: torch.device, new_capture: Callable[[], Capture] | None = None) -> None:
        self._device = device
        self._new_capture = new_capture or (lambda: CudaCapture(device))
        self._capture: Capture | None = None
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._seen: dict[Key, int] = {}
        self._works = True

    def run(self, run: tuple[int, int], layout: Layout, step: Step, fill: Fill) -> Tensor:
        """The step, by a graph where there is one: [layout.rows, hidden_size].

        run: the blocks that `step` computes.  The answer is overwritten by no later step.
        """
        key = (*run, layout.rows, layout.pages)
        graph = self._graphs.get(key) or self._recorded(key, layout, step, fill)
        if graph is None:
            content = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            fill(content)
            return step(layout.inputs(content))
        self._graphs.move_to_end(key)
        fill(graph.content)
        return graph.replay().clone()

    def record(self, run: tuple[int, int], layout: Layout, step: Step, blank: Fill) -> bool:
        """Record a step before it is needed; whether there is a graph now.

        blank: writes inputs that touch no session.
        """
        key = (*run, layout.rows, layout.pages)
        self._seen[key] = self._seen.get(key, 0) + SEEN_BEFORE
        return key in self._graphs or self._recorded(key, layout, step, blank) is not None

    def clear(self) -> None:
        """Drop all graphs: what they read has moved."""
        self._graphs.clear()
        self._capture = None  # its memory may not be shared by graphs that come after the last one is gone

    def _recorded(self, key: Key, layout: Layout, step: Step, fill: Fill) -> _Graph | None:
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if not self._works or seen <= SEEN_BEFORE:
            return None
        if len(self._graphs) == MAX_GRAPHS:
            dropped, _ = self._graphs.popitem(last=False)
            self._seen[dropped] = -USES_AFTER_DROPPING
        if not self._graphs:
            self._capture = None
        try:
            content = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            fill(content)
            inputs = layout.inputs(content)
            self._capture = self._capture or self._new_capture()
            graph = _Graph(content, self._capture(lambda: step(inputs)))
        except RuntimeError as error:
            if lacks_memory(error):
                log.warning("no memory for a CUDA graph of %d rows, tried again later", layout.rows)
                self._seen[key] = -USES_AFTER_NO_MEMORY
                return None
            log.warning("decode steps run without CUDA graphs: %s", str(error).split("\n")[0])
            self._works = False
            self.clear()
            return None
        self._graphs[key] = graph
        return graph


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error is a lack of memory, or came while one was handled.

    A recording that runs out of memory is broken off, which is an error of its own.
    """
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class CudaCapture:
    """Records steps on one side stream into one pool of memory.  Raises RuntimeError where it cannot."""

    def __init__(self, device: torch.device) -> None:
        self._side = side_stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run the step once without recording, so that libraries initialise, and record it."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            run()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # Only what this thread does matters: another one may ask how much memory is free.
        recording = torch.cuda.graph(
            graph, pool=self._memory, stream=self._side, capture_error_mode="thread_local"
        )
        with recording:
            answer = run()

        def replay() -> Tensor:
            graph.replay()
            return answer

        return replay
