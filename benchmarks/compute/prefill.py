"""Prompts by their length through all blocks, and a step behind each: the executor alone, without a network.

    python -m benchmarks prefill --tokens 128 512 2048 8192 --quantize none int8

A prompt goes in chunks as a node computes it.  All rows are measured in turn, round after round, and the
fastest round of a prompt counts: others were interrupted.  Prompts beyond LONG_TOKENS are computed in the
first round alone.  `decode_ms` is the median of steps of one token behind the prompt.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.compute.ragged import load
from benchmarks.lib.results import Run

if TYPE_CHECKING:
    from node.model.blocks.span import Span

STEPS = 8  # of one token behind each prompt
LONG_TOKENS = 4096  # a longer prompt takes a minute, in which interruptions even out: it is computed once


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prefill")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"], choices=("none", "int8"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 128, 512, 1024], help="of each prompt")
    parser.add_argument("--chunk", type=int, default=256, help="positions of a chunk (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all prompts in turn (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    run = Run()
    import torch

    torch.set_num_threads(flags.threads)
    spans = {quantize: load(flags, quantize) for quantize in flags.quantize}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(flags.rounds):
        for quantize, span in spans.items():
            for tokens in flags.tokens:
                if number and tokens > LONG_TOKENS:
                    continue
                with torch.inference_mode():
                    measured = measure(span, tokens, flags.chunk)
                found.setdefault((quantize, tokens), []).append(measured)
    rows: list[dict[str, Any]] = []
    for (quantize, tokens), times in found.items():
        seconds = min(prompt for prompt, _ in times)
        step_ms = statistics.median(step for _, step in times) * 1e3
        rows.append(
            {
                "quantize": quantize, "dtype": flags.dtype, "threads": flags.threads, "tokens": tokens,
                "seconds": seconds, "tokens_per_s": tokens / seconds, "decode_ms": step_ms,
            }
        )  # fmt: skip
        print(
            f"{quantize}, {flags.dtype}: {tokens} tokens in {seconds:.3f} s, {tokens / seconds:.0f} tokens/s;"
            f" a step behind them {step_ms:.2f} ms",
            flush=True,
        )
    run.write(flags.json, rows)
    return 0


def measure(span: Span, tokens: int, chunk: int) -> tuple[float, float]:
    """Seconds of a prompt, and of a step of one token behind it."""
    import torch

    room = tokens + STEPS
    pool = span.new_arena(room + 16, room)
    cache = pool.open(1, room)
    hidden = torch.randn(1, tokens, span.hidden_size, generator=torch.Generator().manual_seed(0))
    cache.reserve(room)
    began = time.perf_counter()
    for first in range(0, tokens, chunk):
        span.forward(hidden[:, first : first + chunk], cache, first)
        cache.length = min(tokens, first + chunk)
    seconds = time.perf_counter() - began
    steps = []
    for _ in range(STEPS):
        began = time.perf_counter()
        span.decode(hidden[0, -1:], [cache], span.start, span.stop)
        steps.append(time.perf_counter() - began)
        cache.length = tokens
    cache.close()
    return seconds, statistics.median(steps)
