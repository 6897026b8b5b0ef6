"""The cost of the journal: the copy of a token's output, next to the decode step that computes it.

    python -m benchmarks journal [--blocks 10] [--tokens 512] [--json FILE]

One process, no network: a span of SmolLM2-135M decodes, and the output of each step goes into a
journal as `node.serving.sessions.worker` does it.  A step and its append are timed one after the other, so
both see one machine.  Then all outputs are read back, as for a replay.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lib.results import Run
from node.model.blocks.span import load_span
from node.model.checkpoint.source import cache_dir, resolve
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.journal import JournalBudget
from tensor_codec.messages.contract import REPLAY_TOKENS, Contract

SESSION = bytes(16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks journal", description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    flags, run = parser.parse_args(arguments), Run()
    torch.set_num_threads(1)
    result = measure(flags.model, flags.blocks, flags.tokens)
    for name, value in result.items():
        print(f"  {name:24} {value:.4g}")
    run.write(flags.json, result)
    return 0


def measure(model: str | None, blocks: int, tokens: int) -> dict[str, float]:
    """Medians, in microseconds, and the share of a hop's step that the append takes."""
    span = load_span(resolve(model, cache_dir=cache_dir()), 0, blocks, dtype=torch.float32)
    contract = Contract(SESSION, 0, blocks, 1, tokens, span.hidden_size, "fp32", 2048)
    budget = JournalBudget(tokens)
    journal = budget.open(SESSION, 1, contract.row_bytes, tokens)
    cache = span.new_cache(1, tokens)
    body = encode_hidden(torch.randn(1, 1, span.hidden_size), "fp32")
    steps, appends = [], []
    for position in range(tokens):
        began = time.perf_counter()
        output = encode_hidden(span.forward(decode_hidden(body, contract), cache, position), "fp32")
        computed = time.perf_counter()
        budget.append(journal, position, 1, output)
        appended = time.perf_counter()
        steps.append(computed - began)
        appends.append(appended - computed)
    began = time.perf_counter()
    for start in range(0, tokens, REPLAY_TOKENS):
        bytes(journal.read(start, min(start + REPLAY_TOKENS, tokens)))
    read = time.perf_counter() - began
    step, append = statistics.median(steps), statistics.median(appends)
    return {
        "blocks": blocks,
        "step_us": step * 1e6,
        "append_us": append * 1e6,
        "append_us_p99": sorted(appends)[int(0.99 * (len(appends) - 1))] * 1e6,
        "share_of_step": append / step,
        "read_us_per_token": read / tokens * 1e6,
    }
