"""Forward and backward of one server: with the activations of one part, of half of the blocks, and of all.

    python -m benchmarks backward [--positions 1024] [--rows 4] [--blocks A:B] [--json FILE]

One process, no network.  A part is what runs between two batches of decode steps: a decode step waits for the
longest one at most.  Ways are measured in turn, so that a noisy machine is noisy for all; on the CPU with one
thread in seconds of the processor, which other programs change less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.results import Run
from node.devices import synchronize
from node.runtime.arguments import device as device_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks backward", description=__doc__)
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--blocks", metavar="A:B", help="default: all")
    parser.add_argument("--positions", type=int, default=1024, help="of all rows (%(default)s)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", type=device_argument)
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all ways in turn (%(default)s)")
    parser.add_argument("--json", type=Path)
    flags, run = parser.parse_args(arguments), Run()
    result = measure(flags)
    for name, value in result.items():
        print(f"  {name:28} {value if isinstance(value, str | list) else f'{value:.4g}'}")
    run.write(flags.json, result)
    return 0


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rounds: seconds of each way, and of its longest part."""
    import torch

    from node.model.blocks import forward_backward as blocks_code
    from node.model.blocks.parts import backward_groups
    from node.model.blocks.span import DTYPES, load_span
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.source import cache_dir, resolve

    torch.set_num_threads(flags.threads)
    folder = resolve(flags.model, cache_dir=cache_dir())
    start, stop = (int(part) for part in (flags.blocks or f"0:{read_info(folder).blocks}").split(":"))
    span = load_span(folder, start, stop, dtype=DTYPES[flags.dtype], device=flags.device)
    tokens = flags.positions // flags.rows
    hidden, grad = torch.randn(2, flags.rows, tokens, span.hidden_size)
    kinds = blocks_code.kinds_of_blocks(span)
    activations = blocks_code.Activations.most(blocks_code.measure_activations(span, kind) for kind in kinds)
    size = span.dtype.itemsize * span.hidden_size

    def back(held: int) -> Callable[[], Generator[None, None, Any]]:
        return lambda: blocks_code.backward_in_parts(span, hidden, grad, start, stop, held=held)

    every = flags.positions * (stop - start)
    ways: dict[str, Callable[[], Generator[None, None, Any]]] = {
        "forward": lambda: blocks_code.forward_in_parts(span, hidden, start, stop),
        "one_part": back(0),
        "half": back(every // 2),
        "all": back(every),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    timed(ways["all"](), flags.device)  # the first run pays for lazy set-up
    for _ in range(flags.rounds):
        for name, work in ways.items():
            seconds[name].append(timed(work(), flags.device))
    result: dict[str, Any] = {
        "positions": flags.positions,
        "rows": flags.rows,
        "blocks": [start, stop],
        "dtype": flags.dtype,
        "device": flags.device,
        "threads": flags.threads,
        "activations_of_a_position": activations.of_a_position(tokens) / size,
        "groups_half": len(backward_groups(flags.positions, start, stop, every // 2)),
    }
    for name, found in seconds.items():
        result[f"{name}_s"] = statistics.median(whole for whole, _ in found)
        result[f"{name}_longest_part_s"] = statistics.median(longest for _, longest in found)
    result["all_mib"] = every * activations.of_a_position(tokens) / 2**20
    return result


def timed(work: Generator[None, None, Any], device: str) -> tuple[float, float]:
    """Seconds of all parts together, and of the longest one."""
    parts: list[float] = []
    clock = clock_of(device)
    while True:
        began = clock()
        try:
            next(work)
        except StopIteration:
            last = finished(began, device)
            return sum(parts) + last, max([*parts, last])
        parts.append(finished(began, device))


def clock_of(device: str) -> Callable[[], float]:
    """Seconds of this thread on the processor; of the wall where a device computes."""
    return time.thread_time if device == "cpu" else time.perf_counter


def finished(began: float, device: str) -> float:
    """Seconds since `began`, when the device has computed everything."""
    synchronize(device)
    return clock_of(device)() - began
