"""The lateness of a node's event loop with a full engine, without a network.

    python -m benchmarks loop_lag --quantize int8 --sessions 16

One process, as in a node: trio next to the torch thread, sessions that decode without pause, two sessions
that prefill long prompts, and a ticker.  The ticker sleeps for 5 ms and notes the delay of its wake-up.
A ticker next to an idle engine is measured in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import trio

from benchmarks.lib.results import Run

TICK_SECONDS = 0.005
PREFILL_TOKENS = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks loop_lag")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--quantize", default="int8", choices=("none", "int8", "nf4"))
    parser.add_argument("--sessions", type=int, default=16, help="that decode (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    run = Run()
    result = trio.run(measure, flags)
    for name, value in result.items():
        print(f"  {name:22} {value:.4g}" if isinstance(value, float) else f"  {name:22} {value}")
    run.write(flags.json, result)
    return 0


async def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The ticker's lag in milliseconds, with an idle engine and with a full one."""
    from node.runtime.compute_thread import open_compute_thread
    from node.serving.executor.engine import Engine
    from node.serving.executor.rates import Rates

    async with open_compute_thread() as compute:
        span = await compute.run(_load, flags)
        engine = Engine(span, compute, Rates(0.0005, 0.0001))
        length = 2 * PREFILL_TOKENS
        pool = await compute.run(span.new_arena, (flags.sessions + 2) * length, length)
        idle = await lags(flags.seconds)
        done = [0, 0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            for number in range(flags.sessions + 2):
                tokens = 1 if number < flags.sessions else PREFILL_TOKENS
                nursery.start_soon(_session, engine, pool, number, tokens, done)
            full = await lags(flags.seconds)
            nursery.cancel_scope.cancel()
    return {
        "sessions": flags.sessions,
        "quantize": flags.quantize,
        "decode_steps_per_s": done[0] / flags.seconds,
        "prefill_tokens_per_s": done[1] * PREFILL_TOKENS / flags.seconds,
        **{f"idle_{name}": value for name, value in figures(idle).items()},
        **{f"full_{name}": value for name, value in figures(full).items()},
    }


async def lags(seconds: float) -> list[float]:
    """The delay of each wake-up of a ticker, in seconds."""
    found = []
    end = trio.current_time() + seconds
    while (due := trio.current_time() + TICK_SECONDS) < end:
        await trio.sleep_until(due)
        found.append(trio.current_time() - due)
    return found


def figures(found: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, 99th percentile and the largest."""
    cuts = statistics.quantiles(found, n=100)
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "max_ms": max(found) * 1e3}


def _load(flags: argparse.Namespace) -> Any:  # Any: torch is not imported yet
    import torch

    from node.model.blocks.span import load_span
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.source import cache_dir, resolve

    torch.set_num_threads(flags.threads)
    folder = resolve(flags.model, cache_dir=cache_dir())
    return load_span(folder, 0, read_info(folder).blocks, quantize=flags.quantize)


async def _session(engine: Any, pool: Any, number: int, tokens: int, done: list[int]) -> None:
    """Steps of `tokens` tokens, one after the other; a full session begins again."""
    import torch

    from tensor_codec.codecs import encode_hidden
    from tensor_codec.messages.contract import Contract, StepRange

    span, length = engine.span, 2 * PREFILL_TOKENS
    contract = Contract(
        number.to_bytes(16, "big"), span.start, span.stop, 1, length, span.hidden_size, "fp32", PREFILL_TOKENS
    )
    cache = pool.open(1, length)
    body = encode_hidden(torch.randn(1, tokens, span.hidden_size), "fp32")
    step = 0
    while True:
        if cache.length + tokens > length:
            engine.before_next(lambda: cache.cut(0))
            position = 0
        else:
            position = cache.length
        what = StepRange(position, tokens, "last")
        await engine.step("peer", contract, cache, what, body, whole=False)
        done[tokens != 1] += 1
        step += 1
