"""The executor alone, without a network: one session and many, in one batch and one by one.

    python -m benchmarks executor --sessions 1 4 8 16 --quantize none int8 --dtype float32
    python -m benchmarks executor --device cuda --shapes llama-3-8b bloom-176b --quantize none int8 nf4

    python -m benchmarks executor --device cuda --tensor-parallel 2 --shapes llama-3-8b

Each row is measured in turn with the whole model in the library (`generate`, greedy, one stream,
float32), so that a noisy machine is noisy for both.  Nothing here imports libp2p.

`share_of_floor` is the time in which the machine reads the weights once (`floor_ms`, by `read_gb_per_s`, the
rate at which the same rounds read memory with the same threads), divided by the time of a step.  With
`--tensor-parallel` they are the weights of one device, which all read at once.  With `--contexts` the
sessions have caches of these lengths, filled with zeros: what is in them takes no time.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.compute.shapes import SHAPES, shape_folder
from benchmarks.compute.shapes import timed as timed_on
from benchmarks.lib.memory_reader import MemoryReader
from benchmarks.lib.results import Run
from node.config import QUANTIZE_CHOICES, ConfigError, config_errors
from node.devices import (
    devices_named,
    find_devices,
    has_own_memory,
    index_of,
    kind_of,
    set_up_allocator,
    use_device,
)
from node.runtime.arguments import devices, ranks
from routing.blocks import Blocks

if TYPE_CHECKING:
    from node.serving.placement.placement import Placement

PROMPT_TOKENS = 32
ROOM = 16  # positions of a session beyond its context and its steps
CACHE_SHARE = 0.5  # of the free memory, for the caches of a row; larger ones are left out


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    flags, run = parse(arguments), Run()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    set_up_allocator()  # as a node does
    import torch

    from node.model.checkpoint.source import cache_dir, resolve

    torch.set_num_threads(flags.threads)
    rows = []
    try:
        with open_placement(flags) as placement:
            reader = MemoryReader(placement.device, 1 << 24 if flags.small else None, flags.threads)
            print(f"{placement.device} reads {reader.bytes_per_second() / 1e9:.1f} GB/s", flush=True)
            for shape in flags.shapes or [None]:
                if shape is None:
                    folder = resolve(flags.model, cache_dir=cache_dir())
                else:
                    folder = shape_folder(shape, flags.shape_blocks, placement.device)
                for dtype in flags.dtype:
                    for quantize in flags.quantize:
                        rows += measure(flags, placement, folder, dtype, quantize, reader)
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
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(SHAPES),
        help="random weights in these shapes, without a reference",
    )
    parser.add_argument(
        "--shape-blocks", type=int, metavar="N", help="of such a model (default: 8 of llama, 1)"
    )
    parser.add_argument("--blocks", metavar="A:B", help="default: all")
    parser.add_argument(
        "--sessions", type=int, nargs="+", help="default: 1 4 8 16; on a GPU and with --contexts 1 4 16 64"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="N",
        help=f"positions of each session (default: prompts of {PROMPT_TOKENS}; on a GPU 100 1000 8000)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", nargs="+", choices=QUANTIZE_CHOICES, help="default: none; on a GPU none int8"
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", type=devices, help="or several: cuda:0,cuda:1")
    parser.add_argument(
        "--tensor-parallel", type=ranks, default=1, metavar="N", help="divide each block among N devices"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both in turn (%(default)s)")
    parser.add_argument("--no-reference", action="store_true", help="without the library's whole model")
    parser.add_argument(
        "--small",
        action="store_true",
        help="tiny shapes, contexts and rounds: whether it runs, on any machine",
    )
    parser.add_argument("--json", metavar="FILE")
    return with_defaults(parser.parse_args(arguments))


def with_defaults(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with defaults for this device where they are not given."""
    gpu = has_own_memory(devices_named(flags.device)[0])
    if flags.small:
        flags.shapes = flags.shapes or ["small-llama", "small-bloom"]
        flags.shapes = [
            name if name.startswith("small") else f"small-{name.split('-')[0]}" for name in flags.shapes
        ]
        flags.contexts, flags.sessions = flags.contexts or [16, 64], flags.sessions or [1, 4]
        flags.tokens, flags.rounds = min(flags.tokens, 4), 1
    if flags.contexts is None and gpu:
        flags.contexts = [100, 1000, 8000]
    flags.sessions = flags.sessions or ([1, 4, 16, 64] if flags.contexts else [1, 4, 8, 16])
    flags.quantize = flags.quantize or (["none", "int8"] if gpu else ["none"])
    flags.dtype = flags.dtype or (["bfloat16"] if gpu else ["float32"])
    flags.no_reference = flags.no_reference or flags.shapes is not None
    return flags


@contextmanager
def open_placement(flags: argparse.Namespace) -> Iterator[Placement]:
    """The devices, and the processes that divide blocks among them.  Raises ConfigError."""
    from node.serving.placement.placement import Placement

    with config_errors():
        found = find_devices(devices_named(flags.device), flags.tensor_parallel)
    use_device(found[0])
    if flags.tensor_parallel == 1:
        yield Placement(found)
        return
    from node.model.parallel.team import open_team

    team = open_team(found, threads=flags.threads)
    try:
        yield Placement(found, team)
    finally:
        team.close()


def measure(
    flags: argparse.Namespace,
    placement: Placement,
    folder: Any,
    dtype: str,
    quantize: str,
    reader: MemoryReader,
) -> list[dict[str, Any]]:
    """The rows for one way to keep the weights.  folder: the model's."""
    from node.model.checkpoint.info import read_info
    from node.serving.memory import Precision

    blocks = read_info(folder).blocks
    start, stop = (int(part) for part in (flags.blocks or f"0:{blocks}").split(":"))
    before = psutil.Process().memory_info().rss
    span = placement.load(folder, Blocks(start, stop), Precision(dtype, quantize))
    reference = None if flags.no_reference else library(folder, flags, placement.device)
    rows = []
    for context in flags.contexts or [None]:
        for sessions in flags.sessions:
            length = PROMPT_TOKENS if context is None else context
            if not fits(span, sessions, length + flags.tokens + ROOM, placement.room().free_bytes):
                print(f"{sessions} sessions of {length} positions do not fit", flush=True)
                continue
            run = Sessions(span, sessions, context, flags.tokens)
            row = {
                "model": str(folder.name),
                "sessions": sessions,
                "context": length,
                "quantize": quantize,
                "dtype": dtype,
                "device": str(placement),
                "threads": flags.threads,
                "blocks": [start, stop],
                "fused": span.fused,
                **figures(flags, placement.device, run, reference, reader),
                "resident_growth_mib": (psutil.Process().memory_info().rss - before) / 2**20,
            }
            row |= floor(span, run, row["read_gb_per_s"] * 1e9)
            row["share_of_floor"] = row["floor_ms"] / row["ms_per_step"]
            run.close()
            del run
            report(row)
            rows.append(row)
    return rows


def fits(span: Any, sessions: int, length: int, free: int) -> bool:  # Any: torch is not imported yet
    """Whether the caches of so many sessions leave room to compute.  free: bytes."""
    position = sum(shape.values for shape in span.shapes if shape) * span.dtype.itemsize
    return bool(sessions * length * position <= CACHE_SHARE * free)


def figures(
    flags: argparse.Namespace,
    device: str,
    run: Sessions,
    reference: Callable[[], float] | None,
    reader: MemoryReader,
) -> dict[str, Any]:
    """What the rounds say: medians.  device: the first one."""
    batched, single, alone, rates = [], [], [], []
    plain = run.context is None  # sessions that were filled by their prompts
    reset_peak(device)
    first = run.decode(1)
    run.decode(2)
    for _ in range(flags.rounds):
        rates.append(reader.bytes_per_second())
        if reference is not None:
            alone.append(reference())
        run.restart()
        batched.append(run.decode(flags.tokens))
        if plain:
            run.restart()
            single.append(run.one_by_one(max(2, flags.tokens // run.count)))
    step = statistics.median(batched)
    rate = statistics.median(alone) if alone else None
    return {
        "read_gb_per_s": statistics.median(rates) / 1e9,
        "tokens_per_s": run.count / step,
        "one_by_one_tokens_per_s": 1 / statistics.median(single) if single else None,
        "reference_tokens_per_s": rate,
        "share_of_reference": None if rate is None else run.count / step / rate,
        "ms_per_step": step * 1e3,
        "first_step_ms": first * 1e3,
        "prefill_tokens_per_s": run.prefill(256),
        "prefill_1024_tokens_per_s": run.prefill(1024) if has_own_memory(device) else None,
        "python_share": run.python_share() if plain else None,
        "cache_mib_in_use": run.cache_bytes() / 2**20,
        "vram_peak_mib": peak_mib(device),
    }


def floor(span: Any, run: Sessions, rate: float) -> dict[str, Any]:  # Any: torch is not imported yet
    """The least time of a step: what reads the weights once, and what reads the caches too.

    rate: bytes read in a second.
    """
    weights = span.nbytes
    return {
        "weights_mib": weights / 2**20,
        "floor_ms": weights / rate * 1e3,
        "floor_with_cache_ms": (weights + run.cache_bytes()) / rate * 1e3,
    }


def reset_peak(device: str) -> None:
    """Count a GPU's memory anew."""
    if kind_of(device) == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(index_of(device))


def peak_mib(device: str) -> float | None:
    """The most memory of a GPU that torch has held since then; None elsewhere."""
    if kind_of(device) != "cuda":
        return None
    import torch

    return torch.cuda.max_memory_reserved(index_of(device)) / 2**20


class Sessions:
    """`count` sessions of different lengths in one page pool, which decode together or in turn.

    context: positions of their caches; None: prompts of PROMPT_TOKENS are computed.  steps: of a round.
    """

    def __init__(self, span: Any, count: int, context: int | None, steps: int) -> None:
        # Any: torch is not imported yet
        import torch

        self.span, self.count, self.context = span, count, context
        self.length = (PROMPT_TOKENS if context is None else context) + steps + ROOM
        self.pool = span.new_arena(count * -(-self.length // ROOM) * ROOM, self.length)
        if hasattr(span, "record"):
            span.record(self.pool)
        self.hidden = torch.randn(count, span.hidden_size, generator=torch.Generator().manual_seed(0))
        self.caches: list[Any] = []
        self.restart()

    def restart(self) -> None:
        """New sessions with a prompt each, each one token longer than the last, until the cache is full."""
        import torch

        self.close()
        for number in range(self.count):
            cache = self.pool.open(1, self.length)
            if self.context is None:
                tokens = PROMPT_TOKENS - number % 16
                self.span.forward(torch.randn(1, tokens, self.span.hidden_size), cache, 0)
            else:
                tokens = max(1, self.context - number % 16)
                cache.reserve(tokens)
                cache.length = tokens
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
        """Tokens a second of a prompt of `tokens` tokens, in a session of its own, until all is computed."""
        import torch

        hidden = torch.randn(1, tokens, self.span.hidden_size)
        seconds = []
        for _ in range(3):
            cache = self.span.new_cache(1, tokens)
            # the copy waits for the last of several devices
            work = lambda cache=cache: self.span.forward(hidden, cache, 0)[:, -1:].cpu()  # noqa: E731
            seconds.append(timed_on(work, self.span.device))
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
        # as for the wire; before this copy a device may have computed nothing
        self.span.decode(hidden, caches, self.span.start, self.span.stop).cpu()
        for cache in caches:
            cache.length += 1


def library(folder: Any, flags: argparse.Namespace, device: str) -> Callable[[], float]:
    """A function that generates with the library's whole model on a device and answers tokens a second."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if has_own_memory(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, local_files_only=True)
    model = model.to(device)
    ids = torch.arange(100, 100 + PROMPT_TOKENS, device=device)[None]

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
    """Seconds of one call, which returns when its answer is here."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def report(row: dict[str, Any]) -> None:
    """One line for people."""
    share = "" if row["share_of_reference"] is None else f" = {row['share_of_reference']:.1f} x the library's"
    single, python = row["one_by_one_tokens_per_s"], row["python_share"]
    more = "" if single is None else f"; one by one {single:.1f}"
    more += "" if python is None else f"; {100 * python:.0f} % of a step is Python"
    more += "" if row["vram_peak_mib"] is None else f"; peak {row['vram_peak_mib']:.0f} MiB"
    print(
        f"{row['model']} {row['dtype']} {row['quantize']}, {row['sessions']} sessions of {row['context']}:"
        f" {row['tokens_per_s']:.1f} tokens/s{share}; {row['ms_per_step']:.2f} ms a step,"
        f" {row['share_of_floor']:.2f} of the floor{more};"
        f" prefill {row['prefill_tokens_per_s']:.0f} tokens/s; weights {row['weights_mib']:.0f} MiB",
        flush=True,
    )
