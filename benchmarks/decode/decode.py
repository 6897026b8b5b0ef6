"""Decoding over a swarm of processes on this machine, next to the whole model in one process.

    python -m benchmarks decode --servers 3 --dtype float32

Rounds of both alternate, so that a noisy machine is noisy for both; medians are over all steps of
all rounds.  The first round of each warms up and does not count.  The cost of a hop is measured token
by token in turn with our code in one process (`side_by_side`).

With --clients all generations of a round begin at once, from one process, each with a prompt of its
own.  The library answers each of these prompts once before the rounds, for the comparison of the tokens.
With --quantize the tokens may differ, since the library stays in --dtype.

With --speculate each round is followed by one with guessed tokens; `gain` is the ratio of their times from
the first token on, round by round, and `speculate_equal` says whether the tokens are those of the rounds
without.  All other figures are of the rounds without.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from benchmarks.lib.processes import LocalSwarm, Worker, equal_spans, local_swarm
from benchmarks.lib.results import Run
from benchmarks.lib.texts import TEXTS, text_of
from node.config import ConfigError
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve
from tensor_codec.messages.contract import CODEC_CHOICES

TEXT = (
    "Once upon a time there was a small village at the foot of a mountain, where an old clockmaker"
    " lived with his daughter. Every morning she walked along the river to the market, and every"
    " evening she told him what she had seen there. One day she came home with a story that he did"
    " not believe at first: "
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if the tokens differ."""
    flags = parse(arguments)
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    try:
        folder = resolve(flags.model, cache_dir=cache_dir())
        spans = equal_spans(read_info(folder).blocks, flags.servers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model = [] if flags.model is None else ["--model", flags.model]
    common = ["--dtype", flags.dtype, "--threads", str(flags.threads), "--quantize", flags.quantize]
    with (
        local_swarm(common, environment=threads) as swarm,
        closing(Worker("benchmarks.decode.reference", [*model, *common], threads)) as reference,
    ):
        swarm.start_spans(spans, *([] if flags.model is None else [flags.model]))
        client_flags = [
            *model,
            "--peers",
            *swarm.peers,
            "--threads",
            str(flags.threads),
            "--codec",
            flags.codec,
        ]
        with closing(Worker("benchmarks.decode.client", client_flags, threads)) as client:
            run = Run()
            result = measure(flags, swarm, client, reference)
    report(result)
    run.write(flags.json, result)
    exact = flags.dtype == "float32" and flags.quantize == "none"
    return 0 if result["tokens_equal"] or not exact else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks decode", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--servers", type=int, default=1, help="nodes, with equal spans (%(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="generations at a time (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--text", choices=sorted(TEXTS), help="the prompts, in place of a tale's beginning")
    parser.add_argument("--speculate", default="off", help="next to rounds without (default: off)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a generation (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "nf4"), help="of the nodes")
    parser.add_argument("--codec", default="auto", choices=CODEC_CHOICES)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def measure(
    flags: argparse.Namespace, swarm: LocalSwarm, client: Worker, reference: Worker
) -> dict[str, Any]:
    """Alternate rounds of the swarm and of the reference; all reported figures."""
    if flags.text is None:
        prompts = prompts_of(client, flags.clients, flags.prompt_tokens)
    else:
        texts = [text_of(flags.text, number) for number in range(flags.clients)]
        prompts = [client.ask({"text": text})["ids"] for text in texts]
    expected = [reference.ask({"ids": ids, "tokens": flags.tokens})["tokens"] for ids in prompts]
    single = {"ids": prompts[0], "tokens": flags.tokens}
    rounds, alone, guessed = [], [], []
    for number in range(flags.rounds + 1):
        alone.append(reference.ask(single))
        cpu = sum(node.cpu_seconds() for node in swarm.nodes)
        rounds.append(client.ask({"prompts": prompts, "tokens": flags.tokens}))
        rounds[-1]["server_cpu_seconds"] = sum(node.cpu_seconds() for node in swarm.nodes) - cpu
        if flags.speculate != "off":
            question = {"prompts": prompts, "tokens": flags.tokens, "speculate": flags.speculate}
            guessed.append(client.ask(question))
        print(f"round {number + 1} of {flags.rounds + 1}", file=sys.stderr)
    shares = [
        equal_share(generation["tokens"], wanted)
        for each in rounds
        for generation, wanted in zip(each["generations"], expected, strict=True)
    ]
    counted = [generation for each in rounds[1:] for generation in each["generations"]]
    step = steps(counted)
    library = steps(alone[1:])
    pairs = [pair for _ in range(flags.rounds) for pair in side_by_side(single, client, reference)]
    tokens = sum(len(generation["tokens"]) for generation in counted)
    wall = sum(each["wall_seconds"] for each in rounds[1:])
    outside = [second for generation in counted for second in generation["outside_compute"][1:]]
    generations = [each["generations"] for each in rounds[1:]]
    rates, decode_rates = client_rates(generations, 0), client_rates(generations, 1)
    first = [generation["seconds"][0] for generation in counted]
    reference_rate = sum(len(each["tokens"]) for each in alone[1:]) / sum(
        each["wall_seconds"] for each in alone[1:]
    )
    return {
        "model": flags.model or "built-in",
        "servers": flags.servers,
        "clients": flags.clients,
        "dtype": flags.dtype,
        "quantize": flags.quantize,
        "threads": flags.threads,
        "prompt_tokens": len(prompts[0]),
        "tokens": flags.tokens,
        "tokens_equal": all(share == 1 for share in shares),
        "tokens_equal_share": statistics.mean(shares),
        "steps_per_s": 1 / step["median"],
        "steps_per_s_p10": 1 / step["p90"],
        "steps_per_s_p90": 1 / step["p10"],
        "reference_steps_per_s": 1 / library["median"],
        "reference_tokens_per_s": reference_rate,
        "same_code_steps_per_s": 1 / statistics.median(near for near, _ in pairs),
        "share_of_reference": library["median"] / step["median"],
        "hop_overhead_ms": statistics.median(far - near for near, far in pairs) / flags.servers * 1e3,
        "wire_ms_per_hop": statistics.median(outside) / flags.servers * 1e3,
        **hop_ms(counted if flags.clients == 1 else []),
        "client_ms_per_token": own_ms(rounds[1:]),
        "ttft_s": statistics.median(first),
        "ttft_max_s": max(first),
        "reference_ttft_s": statistics.median(each["seconds"][0] for each in alone[1:]),
        "aggregate_tokens_per_s": tokens / wall,
        "aggregate_share_of_reference": tokens / wall / reference_rate,
        "client_tokens_per_s": rates,
        "fairness": min(rates) / max(rates),
        "decode_fairness": min(decode_rates) / max(decode_rates),
        "client_bytes_per_token": sum(each["bytes"] for each in rounds[1:]) / tokens,
        "server_cpu_s_per_token": sum(each["server_cpu_seconds"] for each in rounds[1:]) / tokens,
        "client_cpu_s_per_token": sum(each["cpu_seconds"] for each in rounds[1:]) / tokens,
        "server_cpu_ms_per_token": 1e3 * sum(each["server_cpu_seconds"] for each in rounds[1:]) / tokens,
        "client_cpu_ms_per_token": 1e3 * sum(each["cpu_seconds"] for each in rounds[1:]) / tokens,
        "server_rss_mib": max(node.rss_mib() for node in swarm.nodes),
        "client_rss_mib": client.rss_mib(),
        "torch_rss_mib": torch_rss_mib(),
        "start_s": swarm.nodes[0].online_seconds,
        "start_s_all": [node.online_seconds for node in swarm.nodes],
        **({"speculate": flags.speculate, "text": flags.text} if guessed else {}),
        **(speculation_figures(rounds[1:], guessed[1:]) if guessed else {}),
    }


def speculation_figures(
    plain: Sequence[dict[str, Any]], guessed: Sequence[dict[str, Any]]
) -> dict[str, object]:
    """Of rounds without and with guessed tokens, in pairs; the times of several clients are added up."""
    times = [
        [sum(sum(one["seconds"][1:]) for one in each["generations"]) for each in rounds]
        for rounds in (plain, guessed)
    ]
    tokens = [[one["tokens"] for one in each["generations"]] for each in (*plain, *guessed)]
    return {
        "gain": statistics.median(before / after for before, after in zip(*times, strict=True)),
        "speculate_equal": all(each == tokens[0] for each in tokens),
        "speculate_tokens_per_s": sum(len(one) for one in tokens[0])
        / statistics.median(each["wall_seconds"] for each in guessed),
        "plain_tokens_per_s": sum(len(one) for one in tokens[0])
        / statistics.median(each["wall_seconds"] for each in plain),
    }


def prompts_of(client: Worker, clients: int, tokens: int) -> list[list[int]]:
    """A prompt of `tokens` tokens for each client: one text, with the start moved on by one token."""
    ids = client.ask({"text": TEXT * (2 + (clients + tokens) // 50)})["ids"]
    return [ids[index : index + tokens] for index in range(clients)]


def equal_share(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """The share of the tokens before the first difference: later tokens have another past."""
    longest = max(len(tokens), len(expected))
    pairs = enumerate(zip(tokens, expected, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(tokens), len(expected))) / longest


def hop_ms(generations: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Milliseconds of a hop besides its computing, the way to it included: median and fastest tenth."""
    seconds = [second for generation in generations for second in generation["hop_seconds"][1:]]
    if len(seconds) < 2:
        return {"hop_ms": None, "hop_ms_p10": None}
    return {
        "hop_ms": statistics.median(seconds) * 1e3,
        "hop_ms_p10": statistics.quantiles(seconds, n=10)[0] * 1e3,
    }


def own_ms(rounds: Sequence[dict[str, Any]]) -> float | None:
    """Milliseconds of a token in the client besides the head, median; None where several clients share it."""
    seconds = [second for each in rounds if len(each["generations"]) == 1 for second in each["own"]]
    return statistics.median(seconds) * 1e3 if seconds else None


def client_rates(rounds: Sequence[Sequence[dict[str, Any]]], first: int) -> list[float]:
    """Tokens a second of each client over all rounds, from token number `first` on.

    From 0 on these are whole generations, with the wait for the first token; from 1 on decode steps alone,
    and there the first client is the slowest: its steps waited for the prompts of all others.
    """
    rates = []
    for generations in zip(*rounds, strict=True):
        seconds = [second for generation in generations for second in generation["seconds"][first:]]
        rates.append(len(seconds) / sum(seconds))
    return rates


def side_by_side(question: dict[str, Any], client: Worker, reference: Worker) -> list[tuple[float, float]]:
    """Seconds of each decode step, in one process and over the swarm, token by token in turn.

    One code computes the blocks in both.  A step of the one follows a step of the other,
    so both find the machine equally fast and their caches equally cold.
    """
    pairs = []
    for step in range(question["tokens"]):
        near, far = reference.ask(question | {"step": step}), client.ask(question | {"step": step})
        if step:  # the first one is the prefill
            pairs.append((near[1], far[1]))
    return pairs


def steps(generations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median, p10 and p90 of the seconds of a decode step; first tokens do not count."""
    seconds = [second for generation in generations for second in generation["seconds"][1:]]
    cuts = statistics.quantiles(seconds, n=10)
    return {"median": statistics.median(seconds), "p10": cuts[0], "p90": cuts[-1]}


def torch_rss_mib() -> float:
    """Resident memory of a process that only imports torch and the library's base classes."""
    code = (
        "import torch, transformers.modeling_utils, psutil;print(psutil.Process().memory_info().rss / 2**20)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def report(result: dict[str, Any]) -> None:
    """One figure a line."""
    names = ("servers", "clients", "dtype", "quantize", "threads")
    print(", ".join(f"{name} {result[name]}" for name in names))
    for key, value in result.items():
        if isinstance(value, dict):
            value = [f"{name} {what}," for name, what in value.items()]
        values = value if isinstance(value, list) else [value]
        print(f"  {key:28} {' '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in values)}")
