"""An honest client's speed alone, and next to a client that floods with decoding and prefill.

    python -m benchmarks flood --quantize int8

The flooder, with 64 sessions of each sort, sends hidden states as fast as answers come back.  It opens a
session again after a refusal or an end, slowly enough to escape a ban, and never avoids the server.  Rounds
without and with it alternate.  The node's resident memory is compared with the bound
that it printed at its start.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import trio

from benchmarks.decode.decode import TEXT
from benchmarks.lib.processes import Worker, local_swarm
from benchmarks.lib.results import Run

PREFILL_TOKENS = 512
UNDER_WAY_SECONDS = 20  # for the flooder's first steps
# A client that opens faster, or comes again at once, is banned for a minute: the worst client keeps the
# rules.
OPENS_PER_SECOND, RETRY_SECONDS = 15.0, 5.0
BOUND = re.compile(r"bound ([\d.]+) GiB resident")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    flags = parse(arguments)
    if flags.flooder:
        trio.run(flood, flags)
        return 0
    run, threads = Run(), {"OMP_NUM_THREADS": "1"}
    with local_swarm(["--threads", "1", "--quantize", flags.quantize], environment=threads) as swarm:
        node = swarm.start()
        node.wait_online()
        join = ["--peers", *swarm.peers]
        with (
            closing(Worker("benchmarks.decode.client", [*join, "--threads", "1"], threads)) as honest,
            closing(Worker("benchmarks", ["flood", *join, "--flooder"], threads)) as flooder,
        ):
            ids = honest.ask({"text": TEXT})["ids"][:32]
            question = {"prompts": [ids], "tokens": flags.tokens}
            honest.ask(question)
            alone, beside, told = [], [], {}
            for _ in range(flags.rounds):
                alone += steps(honest.ask(question))
                flooder.ask({"flood": True})
                beside += steps(honest.ask(question))
                told = flooder.ask({"flood": False})
        found = BOUND.search(node.log.read_text())
        result: dict[str, Any] = {
            "quantize": flags.quantize,
            "alone_steps_per_s": 1 / statistics.mean(alone),
            "beside_flood_steps_per_s": 1 / statistics.mean(beside),
            "share": statistics.mean(alone) / statistics.mean(beside),
            "flooder": told,
            "node_rss_mib": node.rss_mib(),
            "node_bound_mib": float(found[1]) * 1024 if found else None,
        }
    for name, value in result.items():
        print(f"  {name:26} {value:.4g}" if isinstance(value, float) else f"  {name:26} {value}")
    run.write(flags.json, result)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks flood", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quantize", default="int8", choices=("none", "int8", "nf4"))
    parser.add_argument("--tokens", type=int, default=48, help="of an honest generation (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="without and with it, in turn (%(default)s)")
    parser.add_argument("--sessions", type=int, default=64, help="of the flooder, of each sort (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--flooder", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def steps(round_: dict[str, Any]) -> list[float]:
    """Seconds of the decode steps of a round; first tokens do not count."""
    return [second for generation in round_["generations"] for second in generation["seconds"][1:]]


async def flood(flags: argparse.Namespace) -> None:
    """The flooder: starts at a line on standard input and stops at the next line."""
    from client.config import ClientConfig
    from client.swarm import open_swarm

    async with open_swarm(ClientConfig(tuple(flags.peers), threads=1, wait_seconds=60)) as swarm:
        while await trio.to_thread.run_sync(sys.stdin.readline):
            done: Counter[str] = Counter()
            all_there = trio.current_time() + 2 * flags.sessions / OPENS_PER_SECOND
            async with trio.open_nursery() as nursery:
                for number in range(2 * flags.sessions):
                    tokens = (1, PREFILL_TOKENS)[number % 2]
                    nursery.start_soon(_one, swarm, tokens, number / OPENS_PER_SECOND, done)
                with trio.move_on_after(UNDER_WAY_SECONDS):
                    while done["steps of 1"] < flags.sessions or trio.current_time() < all_there:  # noqa: ASYNC110
                        await trio.sleep(0.05)
                done.clear()
                print(json.dumps({}), flush=True)
                await trio.to_thread.run_sync(sys.stdin.readline)
                nursery.cancel_scope.cancel()
            print(json.dumps(done), flush=True)


async def _one(swarm: Any, tokens: int, delay: float, done: Counter[str]) -> None:
    import torch

    from client.chains.avoided_peers import AvoidedPeers
    from routing.chains.search import NoChain
    from tensor_codec.errors import PeerFault, Refused

    hidden = torch.randn(1, tokens, swarm.info.hidden_size)
    await trio.sleep(delay)
    while True:
        try:
            async with swarm.session(max_length=2 * PREFILL_TOKENS) as session:
                while True:
                    room = session.length + tokens <= 2 * PREFILL_TOKENS
                    await session.step(hidden, None if room else 0, reply="last")
                    done[f"steps of {tokens}"] += 1
        except (Refused, PeerFault, NoChain) as error:
            done[type(error).__name__] += 1
            swarm.routes.blame = AvoidedPeers()  # a flooder does not avoid a server that refuses it
            await trio.sleep(RETRY_SECONDS)
