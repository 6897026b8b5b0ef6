"""Adapters (LoRA) in a server's blocks: what they add to a decode step of many sessions.

    python -m benchmarks adapters [--model FOLDER] [--quantize int8] [--rows 16] [--json FILE]

One process, no network.  Steps without adapters are measured in turn with the steps of each case, so that a
noisy machine is noisy for both; on the CPU with one thread in seconds of the processor.  `slowdown` is the
ratio of a case's step to the step without, the median of all rounds.  `cold_open_extra_ms` and
`warm_open_extra_ms` are null where a case opens no session.  The last row opens sessions over nodes of this
machine (`benchmarks.network.adapter_opening`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.results import Run
from benchmarks.network.adapter_opening import opening_row
from node.config import ConfigError
from node.runtime.arguments import device as device_argument

PROMPT_TOKENS = 17  # of the first session; the others have up to 15 more
ATTENTION = ("q_proj", "v_proj")  # peft's default targets for llama


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks adapters", description=__doc__)
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--blocks", metavar="A:B", help="default: all")
    parser.add_argument("--rows", type=int, default=16, help="of a step (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", default="int8", choices=("none", "int8", "nf4"))
    parser.add_argument("--device", default="cpu", type=device_argument)
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of a case in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of all cases in turn (%(default)s)")
    parser.add_argument("--openings", type=int, default=20, help="of sessions; 0: none (%(default)s)")
    parser.add_argument("--json", type=Path)
    flags, run = parser.parse_args(arguments), Run()
    try:
        rows = decode_rows(flags)
        if flags.openings:
            rows.append(opening_row(flags.model, rounds=flags.openings))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.write(flags.json, rows)
    return 0


def decode_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case of a decode step."""
    import torch

    from node.model.blocks.span import DTYPES, load_span
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.source import cache_dir, resolve

    torch.set_num_threads(flags.threads)
    folder = resolve(flags.model, cache_dir=cache_dir())
    start, stop = (int(part) for part in (flags.blocks or f"0:{read_info(folder).blocks}").split(":"))
    span = load_span(
        folder, start, stop, dtype=DTYPES[flags.dtype], device=flags.device, quantize=flags.quantize
    )
    steps = Steps(span, flags.rows)
    cases = cases_of(span, flags.rows)
    for owners in cases.values():  # the first step compiles, and puts an adapter into the kernels' order
        steps.seconds(owners)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(flags.rounds):
        for name, owners in cases.items():
            pairs = [(steps.seconds(None), steps.seconds(owners)) for _ in range(flags.steps)]
            found[name].append((min(base for base, _ in pairs), min(own for _, own in pairs)))
    rows = []
    for name, pairs in found.items():
        row = {
            "case": name,
            "rows": flags.rows,
            "dtype": flags.dtype,
            "quantize": flags.quantize,
            "device": flags.device,
            "threads": flags.threads,
            "blocks": [start, stop],
            "ms_without": 1e3 * statistics.median(base for base, _ in pairs),
            "ms": 1e3 * statistics.median(own for _, own in pairs),
            "slowdown": statistics.median(own / base for base, own in pairs),
            "adapters_mib": sum({each.id: each.nbytes for each in cases[name] if each}.values()) / 2**20,
            "cold_open_extra_ms": None,
            "warm_open_extra_ms": None,
        }
        print(
            f"{name:24} {row['ms']:6.2f} ms a step, {row['ms_without']:6.2f} ms without:"
            f" {row['slowdown']:.3f}; adapters {row['adapters_mib']:.1f} MiB",
            flush=True,
        )
        rows.append(row)
    return rows


def cases_of(span: Any, rows: int) -> Mapping[str, list[Any]]:
    """The adapter of each row, by the names of the cases.  Any: torch is not imported yet."""

    def spread(count: int, rank: int, names: Sequence[str]) -> list[Any]:
        adapters = [random_adapter(span, seed, rank, names) for seed in range(count)]
        return sorted(itertools.islice(itertools.cycle(adapters), rows), key=lambda each: str(each.id))

    return {
        "none": [None] * rows,
        f"{rows} x r8 q,v": spread(rows, 8, ATTENTION),
        f"{rows} x r16 q,v": spread(rows, 16, ATTENTION),
        "1 x r16 all": spread(1, 16, ()),
        "4 x r16 all": spread(4, 16, ()),
        f"{rows} x r8 all": spread(rows, 8, ()),
        f"{rows} x r16 all": spread(rows, 16, ()),
    }


def random_adapter(span: Any, seed: int, rank: int, names: Sequence[str]) -> Any:
    """A bfloat16 adapter at the linears of these names, of all where empty.  Any: as above."""
    import torch

    from node.model.adapters.low_rank import LowRank, SpanAdapter
    from node.model.adapters.sites import site_shapes

    generator = torch.Generator().manual_seed(seed)

    def matrices(ins: int, outs: int) -> LowRank:
        a = torch.randn(rank, ins, generator=generator) / math.sqrt(ins)
        b = torch.randn(outs, rank, generator=generator) * 0.01
        return LowRank(a.to(span.device, torch.bfloat16), b.to(span.device, torch.bfloat16), 2.0)

    return SpanAdapter(
        f"{rank:02}-{seed:02}",
        {
            block: {name: matrices(*shape) for name, shape in sites.items() if not names or name in names}
            for block, sites in site_shapes(span).items()
        },
    )


class Steps:
    """Decode steps of sessions of different lengths, always at the same positions."""

    def __init__(self, span: Any, rows: int) -> None:
        import torch

        self.alone = span.device.type == "cpu" and torch.get_num_threads() == 1
        generator = torch.Generator().manual_seed(0)
        self.span = span
        self.hidden = torch.randn(rows, span.hidden_size, generator=generator)
        pool = span.new_arena(rows * 64)
        self.caches = []
        for row in range(rows):
            cache = pool.open(1, 64)
            tokens = PROMPT_TOKENS + row % 16
            span.forward(torch.randn(1, tokens, span.hidden_size, generator=generator), cache, 0)
            cache.reserve(tokens + 1)
            self.caches.append(cache)

    def seconds(self, owners: Sequence[Any] | None) -> float:
        """Seconds of a step.  owners: the adapter of each row; None: a call that knows no adapters."""
        named = {} if owners is None else {"adapters": owners}
        # On the CPU seconds of this thread, which other programs change less.
        clock = time.thread_time if self.alone else time.perf_counter
        began = clock()
        answer = self.span.decode(self.hidden, self.caches, self.span.start, self.span.stop, **named)
        if answer.is_cuda:
            answer.cpu()
        return clock() - began
