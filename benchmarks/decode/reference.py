"""The whole model in one process: transformers' own `generate`, and our parts without a network.

A worker of `benchmarks decode`: each line asks for one round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.lib.processes import answer_lines
from node.model.blocks.span import DTYPES, load_span
from node.model.checkpoint.source import cache_dir, resolve
from node.model.embed_and_head import load_embed_and_head


class Stopwatch:
    """A streamer that notes the time of each token of `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        """The prompt first, then each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The end."""


def main() -> None:
    """Load, then answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--quantize", default="none", help="of our parts; the library stays as it is")
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    folder = resolve(flags.model, cache_dir=cache_dir())
    dtype = DTYPES[flags.dtype]
    folder.need({entry.file for entry in folder.tensors.values()})
    library = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype)
    blocks = library.config.num_hidden_layers
    span = load_span(folder, 0, blocks, dtype=dtype, quantize=flags.quantize)
    ends = load_embed_and_head(folder, dtype=torch.float32)
    ends.compile_head()
    ends.make_exact_argmax()

    def generate(ids: list[int], tokens: int) -> dict[str, Any]:
        watch = Stopwatch()
        began = time.perf_counter()
        out = library.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=watch,
        )
        wall = time.perf_counter() - began
        times = [began, *watch.times[1:]]
        return {"tokens": out[0, len(ids) :].tolist(), "seconds": _gaps(times), "wall_seconds": wall}

    def ours(ids: list[int]) -> Iterator[tuple[int, float]]:
        cache = span.new_cache(1, library.config.max_position_embeddings)
        feed = ids
        while True:
            began = time.perf_counter()
            hidden = span.forward(ends.embed(torch.tensor([feed]), cache.length), cache, cache.length)
            feed = [int(ends.head(hidden[:, -1:].float(), best_only=True)[0, -1].argmax())]
            yield feed[0], time.perf_counter() - began

    steps: Iterator[tuple[int, float]] = iter(())

    def answer(question: Any) -> object:  # Any: JSON
        nonlocal steps
        if "step" in question:  # one token of ours at a time, in turn with the swarm's
            if question["step"] == 0:
                steps = ours(question["ids"])
            return next(steps)
        return generate(question["ids"], question["tokens"])

    answer_lines(answer)


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


if __name__ == "__main__":
    main()
