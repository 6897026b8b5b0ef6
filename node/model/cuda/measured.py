"""The way of products with int8 weights on a GPU: timed when a span is loaded, for each shape of its layers.

Triton's kernel reads int8 and is bound by memory.  cuBLAS multiplies faster, once the weights are written out
in 16 bits.  The number of rows from which that pays depends on the card and on the shape.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from node.devices import is_out_of_memory, synchronize
from node.model.cuda import ops
from node.model.cuda.available import kernel_of
from node.model.cuda.launches import on, reason_of, side_stream
from node.model.weights.plans import Plan, choose_plan

log = logging.getLogger("raceme")

MEASURED_ROWS = (1, 16, 64, 256, 1024)  # from one session to a chunk of a prompt
WAYS: tuple[ops.Int8Way, ...] = ("triton", "dequantise")
READ_BYTES = (
    256 << 20
)  # of weights in a run: a card's cache, 50 MB on an H100, does not keep them until the next
RUNS = 5

Weights = tuple[Tensor, Tensor]  # int8 [out, in], float32 scales [out]
Run = Callable[[], object]
Seconds = Callable[[Run], float]

_plans: dict[tuple[str, torch.dtype, int, int], Plan] = {}


def measured_plan(layers: Sequence[Weights], dtype: torch.dtype, seconds: Seconds | None = None) -> Plan:
    """The plan of layers of one shape on one device: some 10 ms, and seconds where kernels are compiled.

    Once for each shape, dtype of activations and kind of card.  seconds: that a card takes for a run.
    Without Triton's kernel there is one way, without memory for weights that are written out the other one,
    and what cannot be timed takes the kernel for the rows of a step.
    """
    weight, _ = layers[0]
    device = weight.device
    if kernel_of("int8_linear", device) is None:
        return Plan(((1, "dequantise"),))
    outs, width = weight.shape
    key = _kind_of_card(device), dtype, outs, width
    if key not in _plans:
        timed = partial(_timed, layers[: max(1, READ_BYTES // weight.nbytes)], dtype)
        of = seconds or partial(seconds_on, device)
        try:
            _plans[key] = choose_plan({way: timed(way, of) for way in WAYS})
        except Exception as error:  # noqa: BLE001  there is a way that needs no measurement
            if is_out_of_memory(error):
                return Plan(((1, "triton"),))
            log.warning("products of %d x %d are not timed on %s: %s", outs, width, device, reason_of(error))
            return Plan(((1, "auto"),))
    return _plans[key]


def _timed(
    layers: Sequence[Weights], dtype: torch.dtype, way: ops.Int8Way, seconds: Seconds
) -> dict[int, float]:
    """Seconds of one way for all layers, one after the other, by the number of rows."""
    taken = {}
    for rows in MEASURED_ROWS:
        x = torch.ones(rows, layers[0][0].shape[1], dtype=dtype, device=layers[0][0].device)

        def run(x: Tensor = x) -> None:
            for weight, scale in layers:
                ops.int8_linear(x, weight, scale, None, way)

        taken[rows] = seconds(run)
    return taken


def seconds_on(
    device: torch.device,
    run: Run,
    recorded: Callable[[torch.device, Run], Run] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[torch.device], None] = synchronize,
) -> float:
    """The seconds that a device takes for a run, the least of five: launches are replayed, as in a step.

    The clock is read when the device has finished what came before, and again when it has finished the run.
    """
    with on(device):
        replay = (recorded or _recorded)(device, run)
        replay()
        taken = []
        for _ in range(RUNS):
            wait(device)
            began = clock()
            replay()
            wait(device)
            taken.append(clock() - began)
    return min(taken)


def _recorded(device: torch.device, run: Run) -> Run:
    """A CUDA graph of the run: launching a kernel from Python takes longer than a small product."""
    run()  # compiles, and lets libraries initialise
    if device.type != "cuda":
        return run
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _kind_of_card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
