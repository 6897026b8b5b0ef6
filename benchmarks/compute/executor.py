"""The executor alone, without a network: one session and many, in one batch and one by one.

    python -m benchmarks executor --sessions 1 4 8 16 --quantize none int8 --dtype float32

Each row is measured in turn with the whole model in the library (`generate`, greedy, one stream,
float32), so that a noisy machine is noisy for both.  Nothing here imports libp2p.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lib.results import Run
from node.config import ConfigError

PROMPT_TOKENS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    flags, run = parse(arguments), Run()
    import torch

    from node.model.checkpoint.source import cache_dir, resolve

    torch.set_num_threads(flags.threads)
    try:
        folder = resolve(flags.model, cache_dir=cache_dir())
        rows = [
            row
            for dtype in flags.dtype
            for quantize in flags.quantize
            for row in measure(flags, folder, dtype, quantize)
        ]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.write(flags.json, rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks executor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--blocks", metavar="A:B", help="default: all")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--quantize", nargs="+", default=["none"], choices=("none", "int8", "nf4"))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both in turn (%(default)s)")
    parser.add_argument("--no-reference", action="store_true", help="without the library's whole model")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def measure(flags: argparse.Namespace, folder: Any, dtype: str, quantize: str) -> list[dict[str, Any]]:
    """The rows for one way to keep the weights.  folder: the model's."""
    from node.model.blocks.span import DTYPES, load_span
    from node.model.checkpoint.info import read_info

    blocks = read_info(folder).blocks
    start, stop = (int(part) for part in (flags.blocks or f"0:{blocks}").split(":"))
    before = psutil.Process().memory_info().rss
    span = load_span(folder, start, stop, dtype=DTYPES[dtype], device=flags.device, quantize=quantize)
    reference = None if flags.no_reference else library(folder, flags)
    pool = span.new_arena(max(flags.sessions) * (PROMPT_TOKENS + flags.tokens + 16))
    rows = []
    for sessions in flags.sessions:
        run = Sessions(span, pool, sessions)
        batched, single, alone = [], [], []
        run.decode(2)
        for _ in range(flags.rounds):
            if reference is not None:
                alone.append(reference())
            run.restart()
            batched.append(run.decode(flags.tokens))
            run.restart()
            single.append(run.one_by_one(max(2, flags.tokens // sessions)))
        step = statistics.median(batched)
        rate = statistics.median(alone) if alone else None
        row = {
            "sessions": sessions,
            "quantize": quantize,
            "dtype": dtype,
            "device": flags.device,
            "threads": flags.threads,
            "blocks": [start, stop],
            "fused": span.fused,
            "tokens_per_s": sessions / step,
            "one_by_one_tokens_per_s": 1 / statistics.median(single),
            "reference_tokens_per_s": rate,
            "share_of_reference": None if rate is None else sessions / step / rate,
            "ms_per_step": step * 1e3,
            "prefill_tokens_per_s": run.prefill(256),
            "python_share": run.python_share(),
            "weights_mib": span.nbytes / 2**20,
            "cache_mib_in_use": run.cache_bytes() / 2**20,
            "resident_growth_mib": (psutil.Process().memory_info().rss - before) / 2**20,
        }
        run.close()
        report(row)
        rows.append(row)
    return rows


class Sessions:
    """`count` sessions of different lengths in one page pool, which decode together or in turn."""

    def __init__(self, span: Any, pool: Any, count: int) -> None:  # Any: torch is not imported yet
        import torch

        self.span, self.pool, self.count = span, pool, count
        self.hidden = torch.randn(count, span.hidden_size, generator=torch.Generator().manual_seed(0))
        self.caches: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """New sessions with a prompt each, each one token longer than the last, until the cache is full."""
        import torch

        self.close()
        for number in range(self.count):
            cache = self.pool.open(1, PROMPT_TOKENS + 1024)
            tokens = PROMPT_TOKENS - number % 16
            self.span.forward(torch.randn(1, tokens, self.span.hidden_size), cache, 0)
            self.caches.append(cache)

    def decode(self, steps: int) -> float:
        """Seconds of the median step of all sessions in one batch."""
        return statistics.median(timed(lambda: self._step(self.caches, self.hidden)) for _ in range(steps))

    def one_by_one(self, steps: int) -> float:
        """Seconds of the median step of one session, each session in turn."""
        return statistics.median(
            timed(lambda cache=cache, row=row: self._step([cache], row[None]))  # type: ignore[misc]
            for _ in range(steps)
            for cache, row in zip(self.caches, self.hidden, strict=True)
        )

    def prefill(self, tokens: int) -> float:
        """Tokens a second of a prompt of `tokens` tokens, in a session of its own."""
        import torch

        hidden = torch.randn(1, tokens, self.span.hidden_size)
        seconds = []
        for _ in range(3):
            cache = self.span.new_cache(1, tokens)
            seconds.append(timed(lambda cache=cache: self.span.forward(hidden, cache, 0)))  # type: ignore[misc]
        return tokens / statistics.median(seconds)

    def python_share(self) -> float:
        """Part of a batched step in Python code, without compiled code: profiled, so an upper bound."""
        profile = cProfile.Profile()
        self.restart()
        profile.runcall(self.decode, 4)
        stats = pstats.Stats(profile)
        python = sum(
            row[2]  # seconds in the function itself
            for (file, _, _), row in stats.stats.items()  # type: ignore[attr-defined]
            if file.endswith(".py") and "kernels" not in Path(file).stem  # compiled functions
        )
        return float(python / stats.total_tt)  # type: ignore[attr-defined]

    def cache_bytes(self) -> int:
        """Bytes of the pages that the sessions own."""
        return sum(cache.nbytes for cache in self.caches)

    def close(self) -> None:
        """End all sessions."""
        while self.caches:
            self.caches.pop().close()

    def _step(self, caches: Sequence[Any], hidden: Any) -> None:
        for cache in caches:
            cache.reserve(cache.length + 1)
        answer = self.span.decode(hidden, caches, self.span.start, self.span.stop)
        if answer.is_cuda:
            answer.cpu()  # as for the wire; before this read torch may have computed nothing
        for cache in caches:
            cache.length += 1


def library(folder: Any, flags: argparse.Namespace) -> Callable[[], float]:
    """A function that generates with the library's whole model and answers tokens a second."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, local_files_only=True)
    model = model.to(flags.device)
    ids = torch.arange(100, 100 + PROMPT_TOKENS, device=flags.device)[None]

    def generate() -> float:
        seconds = timed(
            lambda: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=flags.tokens,
                min_new_tokens=flags.tokens,
                do_sample=False,
            )
        )
        return float(flags.tokens / seconds)

    generate()
    return generate


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(row: dict[str, Any]) -> None:
    """One line for people."""
    share = "" if row["share_of_reference"] is None else f" = {row['share_of_reference']:.1f} x the library's"
    print(
        f"{row['dtype']} {row['quantize']}, {row['sessions']} sessions: {row['tokens_per_s']:.1f} tokens/s"
        f"{share}; one by one {row['one_by_one_tokens_per_s']:.1f}; {row['ms_per_step']:.1f} ms a step,"
        f" {100 * row['python_share']:.0f} % of it Python; prefill"
        f" {row['prefill_tokens_per_s']:.0f} tokens/s; weights {row['weights_mib']:.0f} MiB",
        flush=True,
    )
