"""Steps of several tokens: alone, and in one batch with single tokens of other sessions.

    python -m benchmarks ragged --quantize none int8 --context 64 1024

The steps of a row run as one decode batch, and as they would without ragged batches: the single tokens in one
batch, and each longer step alone.  All rows are measured in turn, round after round, and every step
begins at the same positions again.  `ratio` is the time of a batch over that of one token alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.lib.results import Run

if TYPE_CHECKING:
    from node.model.blocks.span import Span

ALONE = (1, 2, 4, 8, 16)
BATCHES = ((1,) * 8, (4,) * 4 + (1,) * 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ragged")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"], choices=("none", "int8"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--context", nargs="+", type=int, default=[64], help="positions of each session")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of all steps in turn (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    run, rows = Run(), []
    import torch

    torch.set_num_threads(flags.threads)
    for quantize in flags.quantize:
        span = load(flags, quantize)
        for context in flags.context:
            rows += [
                {"quantize": quantize, "dtype": flags.dtype, "context": context, "threads": flags.threads}
                | row
                for row in measure(span, context, flags.rounds)
            ]
    run.write(flags.json, rows)
    return 0


def load(flags: argparse.Namespace, quantize: str) -> Span:
    """All blocks of the model."""
    import torch

    from node.model.blocks.span import load_span
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.source import cache_dir, resolve

    folder = resolve(flags.model, cache_dir=cache_dir())
    dtype = getattr(torch, flags.dtype)
    return load_span(folder, 0, read_info(folder).blocks, dtype=dtype, quantize=quantize)


def measure(span: Span, context: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each batch: milliseconds, medians of the rounds."""
    batches = [*((tokens,) for tokens in ALONE), *BATCHES]
    steps = Steps(span, context, max(map(len, batches)))
    ways: dict[tuple[tuple[int, ...], str], Callable[[], None]] = {}
    for tokens in batches:
        ways[tokens, "together"] = lambda tokens=tokens: steps.together(tokens)  # type: ignore[misc]
        ways[tokens, "apart"] = lambda tokens=tokens: steps.apart(tokens)  # type: ignore[misc]
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):  # the first one sets up
        for way, step in ways.items():
            began = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - began)
    ms = {way: statistics.median(found[1:]) * 1e3 for way, found in seconds.items()}
    rows = []
    for tokens in batches:
        together, apart = ms[tokens, "together"], ms[tokens, "apart"]
        ratio = together / ms[ALONE[:1], "together"]
        rows.append({"tokens": list(tokens), "ms": together, "apart_ms": apart, "ratio": ratio})
        print(
            f"behind {context}: steps of {', '.join(map(str, tokens))}: {together:.2f} ms ({ratio:.2f} x one"
            f" token), {apart:.2f} ms apart",
            flush=True,
        )
    steps.close()
    return rows


class Steps:
    """Sessions of `context` positions each, of zeros: what is in them takes no time."""

    def __init__(self, span: Span, context: int, sessions: int) -> None:
        import torch

        room = context + max(ALONE)
        pool = span.new_arena(sessions * (room + 16), room)
        self.span, self.context = span, context
        self.caches = [pool.open(1, room) for _ in range(sessions)]
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(sessions * max(ALONE), span.hidden_size, generator=generator)
        for cache in self.caches:
            cache.reserve(room)

    def together(self, tokens: Sequence[int]) -> None:
        """A step of so many tokens of each session, in one batch."""
        caches = self._back(len(tokens))
        several = tokens if max(tokens) > 1 else None
        rows = self.hidden[: sum(tokens)]
        self.span.decode(rows, caches, self.span.start, self.span.stop, tokens=several)

    def apart(self, tokens: Sequence[int]) -> None:
        """The same, the single tokens in one batch and every longer step alone, as a prefill."""
        caches = self._back(len(tokens))
        single = [cache for cache, count in zip(caches, tokens, strict=True) if count == 1]
        if single:
            self.span.decode(self.hidden[: len(single)], single, self.span.start, self.span.stop)
        for cache, count in zip(caches, tokens, strict=True):
            if count > 1:
                self.span.forward(self.hidden[None, :count], cache, self.context)

    def close(self) -> None:
        """End all sessions."""
        for cache in self.caches:
            cache.close()

    def _back(self, sessions: int) -> list[Any]:
        for cache in self.caches:
            cache.length = self.context
        return self.caches[:sessions]
