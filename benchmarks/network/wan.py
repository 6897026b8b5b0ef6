"""Decoding and prefill over links with a delay and a rate, next to the bound that the links set.

    python -m benchmarks wan                                    # three sorts of link, as a table
    python -m benchmarks wan --rtt-ms 100 --mbit 100 --servers 3
    python -m benchmarks wan --rtt-ms 100 --mbit 10 --servers 3 --codec fast    # int8o over slow links
    python -m benchmarks wan --rtt-ms 100 --text code --speculate auto --tokens 96    # guessed tokens

Real processes; every connection between them goes through a link (tests/fault_link.py) with half the
round trip as its delay each way, and the benchmark fails if one does not.  All connections to a node
share its link, in each direction.

The limit comes from the run itself.  A step passes `servers + 1` links, each with its delay and the time of
its bytes at the rate.  Every hop and the client's ends compute it, one after another.  The limit contains
nothing else.  The rows without delay, with and without the proxy, show the proxy's own time.

With --speculate each round is followed by one with guessed tokens; `gain` is the ratio of their decode times,
round by round.  All other figures are of the rounds without.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.decode.decode import prompts_of
from benchmarks.lib.processes import LocalSwarm, ProcessError, Worker, equal_spans, free_port, local_swarm
from benchmarks.lib.results import Run
from benchmarks.lib.texts import TEXTS, text_of
from benchmarks.network.first_blocks import write_first_blocks
from node.config import ConfigError
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve
from node.runtime.arguments import positive
from tensor_codec.messages.contract import CODEC_CHOICES

THREADS = {"OMP_NUM_THREADS": "1"}
COMMON = ["--threads", "1", "--dtype", "float32", "--device", "cpu"]


@dataclass(frozen=True, slots=True)
class Links:
    """The properties of every link.  rtt_ms: there and back; mbit: a second, each way; None for no bound.

    proxied: False for plain connections, without delay and bound.
    """

    rtt_ms: float
    mbit: float | None
    proxied: bool = True

    @property
    def one_way_seconds(self) -> float:
        """The delay of one direction."""
        return self.rtt_ms / 2e3

    @property
    def bytes_per_second(self) -> float:
        """The rate of one direction."""
        return math.inf if self.mbit is None else self.mbit * 1e6 / 8


TABLE = (Links(0, None, proxied=False), Links(0, None), Links(5, 1000), Links(5, 100), Links(100, 100))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if the tokens differ where the codec loses nothing."""
    flags, run = parse(arguments), Run()
    with tempfile.TemporaryDirectory() as folder:
        if flags.first_blocks is not None:
            try:
                model = resolve(flags.model, cache_dir=cache_dir()).path
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            flags.model = str(Path(folder) / "first-blocks")
            write_first_blocks(model, flags.first_blocks, Path(flags.model))
        return run_rows(flags, run)


def run_rows(flags: argparse.Namespace, run: Run) -> int:
    """As `main`.  run: whose results are written."""
    rows = TABLE if flags.rtt_ms is None else (Links(flags.rtt_ms, flags.mbit),)
    try:
        blocks = read_info(resolve(flags.model, cache_dir=cache_dir())).blocks
        spans = equal_spans(blocks, flags.servers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    expected: list[int] | None = None
    results = []
    for links in rows:
        with wan(flags, spans, links) as (nodes, clients):
            ids = prompt_of(clients[0], flags)
            if expected is None:
                expected = tokens_of_the_whole_model(flags, ids)
            results.append(measure(flags, links, clients, ids, expected))
            results[-1]["server_rss_mib"] = max(node.rss_mib() for node in nodes.nodes)
        print(f"row {len(results)} of {len(rows)}", file=sys.stderr)
    report(results)
    run.write(flags.json, results if flags.rtt_ms is None else results[0])
    if flags.codec not in ("auto", "exact", "fp32"):  # the servers compute in float32
        return 0
    return 0 if all(result["tokens_equal"] for result in results) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks wan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rtt-ms", type=float, help="of every link (default: a table of several)")
    parser.add_argument("--mbit", type=float, help="a second, of every link each way (default: no bound)")
    parser.add_argument("--servers", type=int, default=3, help="nodes, with equal spans (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument(
        "--text", choices=sorted(TEXTS), help="a prompt of this kind, in place of a long tale"
    )
    parser.add_argument(
        "--speculate", default="off", help="next to rounds without: auto, lookup, or a model (default: off)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a generation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="generations that count (%(default)s)")
    parser.add_argument(
        "--bulk", action="store_true", help="also next to a client that prefills all the time"
    )
    parser.add_argument(
        "--codec", choices=CODEC_CHOICES, default="auto", help="of the clients (default: auto)"
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument(
        "--first-blocks", type=positive, metavar="N",
        help="of the model alone: servers whose computing hardly counts, as on GPUs",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    if flags.mbit is not None and flags.rtt_ms is None:
        parser.error("--mbit goes with --rtt-ms")
    return flags


# The processes.


@contextmanager
def wan(
    flags: argparse.Namespace, spans: Sequence[tuple[int, int]], links: Links
) -> Iterator[tuple[LocalSwarm, list[Worker]]]:
    """Nodes and one client, two with --bulk, all at links.  Raises ProcessError if one is not."""
    model = [] if flags.model is None else [flags.model]
    with ExitStack() as stack:
        swarm = stack.enter_context(local_swarm(COMMON, environment=THREADS))
        proxy = stack.enter_context(closing(Worker("tests.fault_link", [], {}))) if links.proxied else None
        ports = []
        for start, stop in spans:
            port = free_port()
            ports.append(port)
            where = ["--listen", f"/ip4/127.0.0.1/tcp/{port}"]
            if proxy is not None:
                where += ["--announce", f"/ip4/127.0.0.1/tcp/{open_link(proxy, port, links)}"]
            swarm.start(*model, "--blocks", f"{start}:{stop}", *where).wait_online()
        join = ["--peers", *swarm.peers, "--codec", flags.codec, *(["--model", *model] if model else [])]
        clients = [
            stack.enter_context(closing(Worker("benchmarks.network.wan_client", join, THREADS)))
            for _ in range(1 + flags.bulk)
        ]
        yield swarm, clients
        if proxy is not None:
            processes = [node.process.pid for node in swarm.nodes] + [each.process.pid for each in clients]
            check_all_proxied(processes, proxy.process.pid)


def open_link(proxy: Worker, port: int, links: Links) -> int:
    """A link to the listener on `port`; the port to dial instead."""
    opened = proxy.ask({"do": "open", "target": ["127.0.0.1", port]})
    rate = links.bytes_per_second
    proxy.ask(
        {
            "do": "set",
            "link": opened["link"],
            "delay_seconds": links.one_way_seconds,
            "bytes_per_second": None if rate == math.inf else rate,
        }
    )
    return int(opened["port"])


def check_all_proxied(processes: Sequence[int], proxy: int) -> None:
    """Raises ProcessError if any TCP connection of `processes` has its other end elsewhere."""
    ours = {end.laddr.port for end in psutil.Process(proxy).net_connections("tcp")}
    for process in processes:
        ends = psutil.Process(process).net_connections("tcp")
        others = [end.raddr.port for end in ends if end.status == psutil.CONN_ESTABLISHED]
        if not others or not ours.issuperset(others):
            raise ProcessError(f"process {process} has connections to ports {others}, not all are a link's")


# The measurements.


def tokens_of_the_whole_model(flags: argparse.Namespace, ids: Sequence[int]) -> list[int]:
    """The tokens of transformers' own `generate`."""
    model = [] if flags.model is None else ["--model", flags.model]
    with closing(Worker("benchmarks.decode.reference", [*model, *COMMON[:4]], THREADS)) as reference:
        return list(reference.ask({"ids": ids, "tokens": flags.tokens})["tokens"])


def prompt_of(client: Worker, flags: argparse.Namespace) -> list[int]:
    """The tokens of --text, or of as much of the tale as --prompt-tokens says."""
    if flags.text is not None:
        return list(client.ask({"text": text_of(flags.text)})["ids"])
    return prompts_of(client, 1, flags.prompt_tokens)[0]


def measure(
    flags: argparse.Namespace,
    links: Links,
    clients: Sequence[Worker],
    ids: list[int],
    expected: list[int],
) -> dict[str, Any]:
    """One row: rounds of one client, with --bulk also next to a second one; the first round warms up."""
    question = {"ids": ids, "tokens": flags.tokens}
    rounds, guessed = [], []
    for _ in range(flags.rounds + 1):
        rounds.append(clients[0].ask(question))
        if flags.speculate != "off":
            guessed.append(clients[0].ask(question | {"speculate": flags.speculate}))
    step_bytes = rounds[-1]["row_bytes"]
    result = {
        "servers": flags.servers,
        "rtt_ms": links.rtt_ms,
        "mbit": links.mbit,
        "proxied": links.proxied,
        "prompt_tokens": len(ids),
        "text": flags.text,
        "tokens_equal": all(
            [token["id"] for token in each["tokens"]] == expected for each in rounds + guessed
        ),
        "codec": flags.codec,
        "session_codec": rounds[-1]["codec"],
        "token_bytes": sum(step_bytes),
        **decode_figures(rounds[1:], links, step_bytes),
        "prefill_limit_s": prefill_limit(rounds[-1]["prompt_row_bytes"], links, len(ids)),
        **prefill_figures(rounds[1:], links, flags.servers, len(ids)),
    }
    if guessed:
        result |= {"speculate": flags.speculate, **speculation_figures(rounds[1:], guessed[1:])}
    if flags.bulk:
        clients[1].ask({"bulk": ids})
        beside = [clients[0].ask(question) for _ in range(flags.rounds)]
        done = clients[1].ask({"stop": True})
        figures = decode_figures(beside, links, step_bytes)
        names = ("steps_per_s", "network_ms", "queue_ms", "computing_ms")
        result |= {f"bulk_{name}": figures[name] for name in names}
        result["bulk_share"] = figures["steps_per_s"] / result["steps_per_s"]
        result["bulk_tokens_per_s"] = done["tokens"] / done["seconds"]
    return result


def decode_figures(
    rounds: Sequence[Mapping[str, Any]], links: Links, step_bytes: Sequence[int]
) -> dict[str, float]:
    """Of the decode steps: the rate, the limit, and the parts of the time; medians over all steps.

    step_bytes: on each link.
    outside_ms: of a step, beyond the limit.  network_ms: time in which no hop held the step; queue_ms: time
    in which a hop held the step and did not compute.
    """
    steps = [token for each in rounds for token in each["tokens"][1:]]
    wire = len(step_bytes) * links.one_way_seconds + sum(step_bytes) / links.bytes_per_second
    computing = [sum(busy for _, busy in step["hops"][-1]) for step in steps]
    held = [sum(held for held, _ in step["hops"][-1]) for step in steps]
    limits = [wire + busy + step["ends"] for busy, step in zip(computing, steps, strict=True)]
    median, limit = statistics.median(step["seconds"] for step in steps), statistics.median(limits)
    outside = (step["seconds"] - least for step, least in zip(steps, limits, strict=True))
    queued = (whole - busy for whole, busy in zip(held, computing, strict=True))
    return {
        "steps_per_s": 1 / median,
        "limit_steps_per_s": 1 / limit,
        "share_of_limit": limit / median,
        "outside_ms": statistics.median(outside) * 1e3,
        "network_ms": statistics.median(step["network"] for step in steps) * 1e3,
        "queue_ms": statistics.median(queued) * 1e3,
        "computing_ms": statistics.median(computing) * 1e3,
        "ends_ms": statistics.median(step["ends"] for step in steps) * 1e3,
    }


def prefill_limit(row_bytes: Sequence[int], links: Links, tokens: int) -> float:
    """Seconds of a prompt if nothing computed, and if all links carried parts of it at once.

    row_bytes: of a token of the prompt, on each link; the last one carries the answer alone.
    """
    return len(row_bytes) * links.one_way_seconds + tokens * max(row_bytes[:-1]) / links.bytes_per_second


def prefill_figures(
    rounds: Sequence[Mapping[str, Any]], links: Links, servers: int, tokens: int
) -> dict[str, float]:
    """Of the prompt, medians over the rounds.

    open_s: of the time to the first token, until the session was open.  prefill_seconds: the other part.
    prefill_ratio: prefill_seconds less the delays of one way along the chain, over the slowest hop's
    computing: 1 if that hop never waited, and no time passed before or after it.
    """
    delays = (servers + 1) * links.one_way_seconds
    firsts = [each["tokens"][0] for each in rounds]
    seconds = [first["seconds"] - each["open_seconds"] for first, each in zip(firsts, rounds, strict=True)]
    slowest = [max(sum(step[hop][1] for step in first["hops"]) for hop in range(servers)) for first in firsts]
    median = statistics.median(seconds)
    ratios = ((spent - delays) / busy for spent, busy in zip(seconds, slowest, strict=True))
    return {
        "ttft_s": statistics.median(first["seconds"] for first in firsts),
        "open_s": statistics.median(each["open_seconds"] for each in rounds),
        "prefill_seconds": median,
        "prefill_tokens_per_s": tokens / median,
        "prefill_slowest_hop_s": statistics.median(slowest),
        "prefill_ratio": statistics.median(ratios),
        "prefill_steps": len(firsts[0]["hops"]),
    }


def speculation_figures(
    plain: Sequence[Mapping[str, Any]], guessed: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Of rounds without and with guessed tokens, in pairs: medians over the pairs.

    gain: ratio of the times from the first token on.  tokens_per_step: with guesses.
    """
    seconds = [
        [sum(token["seconds"] for token in each["tokens"][1:]) for each in rounds]
        for rounds in (plain, guessed)
    ]
    tokens = len(plain[0]["tokens"]) - 1
    steps = sum(len(token["hops"]) for each in guessed for token in each["tokens"][1:])
    return {
        "gain": statistics.median(before / after for before, after in zip(*seconds, strict=True)),
        "plain_tokens_per_s": tokens / statistics.median(seconds[0]),
        "speculate_tokens_per_s": tokens / statistics.median(seconds[1]),
        "tokens_per_step": tokens * len(guessed) / steps,
    }


# The output.


def report(results: Sequence[Mapping[str, Any]]) -> None:
    """A column for each row of the table, a figure a line."""
    print(f"{results[0]['servers']} servers, {os.cpu_count()} cores")
    for name in results[0]:
        if name != "servers":
            print(f"  {name:24}", *(f"{shown(result[name]):>10}" for result in results))


def shown(value: object) -> str:
    """A figure, in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
