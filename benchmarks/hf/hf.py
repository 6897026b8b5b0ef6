"""A transformers model over a swarm of processes here, next to `Swarm.generate` and to one process.

    python -m benchmarks hf --servers 3

Calls that are compared alternate within each round, so that a noisy machine is noisy for all; a share is the
median over the rounds of one time divided by the other.  The first round warms up and does not count.

share_of_generate: the slower one of greedy and sampled calls that the client's own loop runs, to
`Swarm.generate`; share_of_library: calls that need the library's loop, to the same.
batch_share: the tokens a second of one batch of 16 rows, to 16 generations at once; padded_batch_share: with
8 lengths of padding.  beams_share: of 5 beams' speed to greedy's over the swarm, to the same in one process.
forward_backward_share_of_plain: positions a second of 8 x 128, to the whole model in one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from benchmarks.lib.processes import LocalSwarm, equal_spans, local_swarm
from benchmarks.lib.results import Run
from node.config import ConfigError
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

ROWS, PADDINGS, BEAMS = 16, 8, 5
TRAIN_ROWS, TRAIN_TOKENS = 8, 128
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
Call = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if the tokens differ, 2 if this machine cannot run it."""
    flags = parse(arguments)
    try:
        folder = resolve(flags.model, cache_dir=cache_dir())
        spans = equal_spans(read_info(folder).blocks, flags.servers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    common = ["--dtype", "float32", "--threads", str(flags.threads), "--quantize", flags.quantize]
    with local_swarm(common, environment=threads) as swarm:
        swarm.start_spans(spans, *([] if flags.model is None else [flags.model]))
        run = Run()
        result = measure(flags, swarm, folder.path)
    for key, value in result.items():
        print(f"{key:34} {value:.3f}" if isinstance(value, float) else f"{key:34} {value}")
    run.write(flags.json, result)
    return 0 if result["tokens_equal"] or flags.quantize != "none" else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks hf", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--servers", type=int, default=1, help="nodes, with equal spans (%(default)s)")
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "nf4"), help="of the nodes")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a call (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def measure(flags: argparse.Namespace, nodes: LocalSwarm, path: Any) -> dict[str, Any]:
    """All figures of one swarm."""
    import torch
    from transformers import AutoModelForCausalLM

    import client
    from client.hf import from_swarm

    torch.set_num_threads(flags.threads)
    with client.connect_sync(flags.model, peers=nodes.peers, threads=flags.threads) as swarm:
        list(swarm.generate([1, 2, 3], max_new_tokens=4, do_sample=False))
        plain_rss = rss_mib()
        model = from_swarm(swarm)
        rss = rss_mib()
        local = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)
        vocabulary = model.config.vocab_size
        torch.manual_seed(0)
        ids = torch.randint(100, vocabulary - 100, (ROWS, flags.prompt_tokens))
        found: dict[str, Any] = {
            "model": flags.model or "built-in",
            "servers": flags.servers,
            "quantize": flags.quantize,
            "threads": flags.threads,
            "client_rss_mib": plain_rss,
            "model_rss_mib": rss - plain_rss,
        }
        found |= generations(flags, swarm, model, local, ids)
        found |= batches(flags, swarm, model, ids)
        found |= beams(flags, model, local, ids)
        found |= training(flags, model, local, ids)
    return found


def generations(flags: argparse.Namespace, swarm: Any, model: Any, local: Any, ids: Any) -> dict[str, Any]:
    """One row: the client's own loop, and the library's."""
    import torch

    one, tokens = ids[:1], flags.tokens
    sampling = {"do_sample": True, "top_k": 50, "temperature": 1.0, "eos_token_id": None, "pad_token_id": 0}

    def own(**options: Any) -> list[int]:
        return [t.id for t in swarm.generate(one, max_new_tokens=tokens, **options)]

    def sampled(each: Any) -> Any:
        torch.manual_seed(7)
        return each.generate(one, max_new_tokens=tokens, **sampling)

    calls: dict[str, Call] = {
        "own": lambda: own(do_sample=False, generation_config=False),
        "greedy": lambda: model.generate(one, max_new_tokens=tokens, **GREEDY),
        "own_sampled": lambda: own(do_sample=True, top_k=50, temperature=1.0, generation_config=False),
        "sampled": lambda: sampled(model),
        "library": lambda: model.generate(one, max_new_tokens=tokens, stopping_criteria=[_never], **GREEDY),
        "local": lambda: local.generate(one, max_new_tokens=tokens, **GREEDY),
    }
    seconds, answers = alternate(calls, flags.rounds)
    new = one.shape[1]
    expected = answers["local"][0, new:].tolist()
    equal = (
        answers["greedy"][0, new:].tolist() == expected
        and answers["library"][0, new:].tolist() == expected
        and answers["own"] == expected
        and torch.equal(sampled(local), answers["sampled"])
    )
    greedy = share(seconds, "own", "greedy")
    drawn = share(seconds, "own_sampled", "sampled")
    return {
        "tokens_equal": equal,
        "share_of_generate": min(greedy, drawn),
        "greedy_share_of_generate": greedy,
        "sampled_share_of_generate": drawn,
        "share_of_library": share(seconds, "own", "library"),
        "share_of_local": share(seconds, "local", "greedy"),
        "tokens_per_s": tokens / statistics.median(seconds["greedy"]),
        "library_tokens_per_s": tokens / statistics.median(seconds["library"]),
    }


def batches(flags: argparse.Namespace, swarm: Any, model: Any, ids: Any) -> dict[str, Any]:
    """Sixteen rows: in one batch, with padding, and as sixteen generations at once."""
    tokens = flags.tokens
    mask = ids.new_ones(ids.shape)
    for row in range(ROWS):
        mask[row, : row % PADDINGS] = 0

    def at_once() -> None:
        def run(row: int) -> None:
            for _ in swarm.generate(
                ids[row], max_new_tokens=tokens, do_sample=False, generation_config=False
            ):
                pass

        workers = [threading.Thread(target=run, args=(row,)) for row in range(ROWS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    calls: dict[str, Call] = {
        "clients": at_once,
        "batch": lambda: model.generate(ids, max_new_tokens=tokens, **GREEDY),
        "padded": lambda: model.generate(ids * mask, attention_mask=mask, max_new_tokens=tokens, **GREEDY),
    }
    seconds, _ = alternate(calls, flags.rounds)
    return {
        "batch_share": share(seconds, "clients", "batch"),
        "padded_batch_share": share(seconds, "clients", "padded"),
        "batch_tokens_per_s": ROWS * tokens / statistics.median(seconds["batch"]),
        "clients_tokens_per_s": ROWS * tokens / statistics.median(seconds["clients"]),
    }


def beams(flags: argparse.Namespace, model: Any, local: Any, ids: Any) -> dict[str, Any]:
    """Five beams, next to greedy by the same loop."""
    import torch

    one, options = ids[:1], {"max_new_tokens": flags.tokens, **GREEDY}
    calls: dict[str, Call] = {
        "greedy": lambda: model.generate(one, stopping_criteria=[_never], **options),
        "beams": lambda: model.generate(one, num_beams=BEAMS, **options),
        "local_greedy": lambda: local.generate(one, **options),
        "local_beams": lambda: local.generate(one, num_beams=BEAMS, **options),
    }
    seconds, answers = alternate(calls, flags.rounds)
    return {
        "beams_equal": torch.equal(answers["beams"], answers["local_beams"]),
        "beams_share": share(seconds, "greedy", "beams") / share(seconds, "local_greedy", "local_beams"),
        "beams_share_of_local": share(seconds, "local_beams", "beams"),
    }


def training(flags: argparse.Namespace, model: Any, local: Any, ids: Any) -> dict[str, Any]:
    """Forward and backward of 8 x 128 positions to a gradient at the embeddings."""
    import torch

    torch.manual_seed(1)
    tokens = torch.randint(100, model.config.vocab_size - 100, (TRAIN_ROWS, TRAIN_TOKENS))

    def step(each: Any) -> Any:
        embeds = local.get_input_embeddings()(tokens).requires_grad_()
        each(inputs_embeds=embeds, labels=tokens).loss.backward()
        return embeds.grad

    calls: dict[str, Call] = {"plain": lambda: step(local), "swarm": lambda: step(model)}
    seconds, answers = alternate(calls, flags.rounds)
    plain = answers["plain"]
    positions = TRAIN_ROWS * TRAIN_TOKENS
    return {
        "forward_backward_share_of_plain": share(seconds, "plain", "swarm"),
        "forward_backward_positions_per_s": positions / statistics.median(seconds["swarm"]),
        "gradient_error": float((answers["swarm"] - plain).abs().max() / plain.abs().max()),
    }


def alternate(calls: dict[str, Call], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The seconds of each call in every round that counts, and its last answer."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            with timed() as spent:
                answers[name] = call()
            if number:
                seconds[name] += spent
        print(f"round {number + 1} of {rounds + 1}: {', '.join(calls)}", file=sys.stderr)
    return seconds, answers


def rss_mib() -> float:
    """Resident memory of this process, in MiB."""
    return float(psutil.Process().memory_info().rss / 2**20)


@contextmanager
def timed() -> Iterator[list[float]]:
    """The seconds of the block, in a list that is filled at its end."""
    spent: list[float] = []
    began = time.perf_counter()
    yield spent
    spent.append(time.perf_counter() - began)


def share(seconds: dict[str, list[float]], base: str, other: str) -> float:
    """The median over the rounds of the speed of `other`, with that of `base` as 1."""
    return statistics.median(a / b for a, b in zip(seconds[base], seconds[other], strict=True))


def _never(input_ids: Any, scores: Any, **arguments: Any) -> Any:
    """Ends no row."""
    import torch

    return torch.zeros(len(input_ids), dtype=torch.bool)
