"""The choice of a chain in a swarm of many servers: time and memory, nothing else of a node.

    python -m benchmarks routing --servers 1000 10000 --blocks 126

Spans of 3 to 24 blocks at random places, 16 announced round-trip times each.  Three times are given: with
an empty cache, with one new record since the last choice, and without a new record.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.lib.results import Run
from routing.chains.distances import Distances
from routing.chains.load_sharing import MAX_PEERS, client_bias, queue_markup, sample
from routing.chains.search import Chain, CostInputs, cheapest_chain
from routing.names import PeerId, peer_id_of
from routing.view.records import MAX_RTTS, Record


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    flags, run = parse(arguments), Run()
    rows = [measure(servers, flags) for servers in flags.servers]
    print("servers  cold ms  one new record ms (p95)  nothing new ms  kept MB  peak MB  hops")
    for row in rows:
        print(
            f"{row['servers']:7}  {row['cold_ms']:7.1f}"
            f"  {row['decision_ms']:14.1f} ({row['decision_ms_p95']:6.1f})"
            f"  {row['unchanged_ms']:14.1f}  {row['kept_mb']:7.1f}  {row['peak_mb']:7.1f}  {row['hops']:4}"
        )
    run.write(flags.json, rows)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks routing", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--servers", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--blocks", type=int, default=126, help="of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each choice (%(default)s)")
    parser.add_argument("--all", action="store_true", help="look at every server, not at a sample of many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def swarm(servers: int, blocks: int, rng: random.Random) -> list[Record]:
    """The records of an invented swarm."""
    peers = [peer_id_of(rng.randbytes(32)) for _ in range(servers)]
    return [server(peer, peers, blocks, rng) for peer in sorted(peers)]


def server(peer: PeerId, peers: Sequence[PeerId], blocks: int, rng: random.Random) -> Record:
    """One record."""
    length = min(blocks, rng.randint(3, 24))
    start = rng.randint(0, blocks - length)
    return Record(
        peer=peer,
        role="serve",
        blocks=blocks,
        start=start,
        stop=start + length,
        seconds_per_block=rng.uniform(0.001, 0.01),
        rtt={other: rng.uniform(0.001, 0.2) for other in rng.sample(peers, min(MAX_RTTS, len(peers)))},
    )


def choose(
    spans: Sequence[Record], client_rtt: dict[PeerId, float], distances: Distances, most: int
) -> Chain:
    """One choice of a client, from the records of its view.  most: number of servers that it compares."""
    looked_at = sample(spans, "client", most=most)
    distances.update(looked_at, client_rtt)
    markup, bias = queue_markup(looked_at), client_bias("client", (span.peer for span in looked_at))
    factors = {peer: markup[peer] * bias[peer] for peer in markup}
    known = CostInputs(client_rtt=client_rtt, distances=distances)
    return cheapest_chain(looked_at, spans[0].blocks, known=known, cost_factors=factors)


def measure(servers: int, flags: argparse.Namespace) -> dict[str, Any]:
    """The row for one number of servers."""
    rng = random.Random(flags.seed)
    spans = swarm(servers, flags.blocks, rng)
    client_rtt = {span.peer: rng.uniform(0.01, 0.2) for span in rng.sample(spans, min(16, servers))}
    once = partial(choose, spans, client_rtt, most=servers if flags.all else MAX_PEERS)
    kept = Distances()
    chain = once(kept)

    def with_one_new() -> None:
        place = rng.randrange(servers)
        spans[place] = replace(spans[place], queue=rng.randint(0, 3))
        once(kept)

    changed = _times(with_one_new, flags.rounds)
    row = {
        "servers": servers,
        "blocks": flags.blocks,
        "cold_ms": statistics.median(_times(lambda: once(Distances()), min(3, flags.rounds))),
        "decision_ms": statistics.median(changed),
        "decision_ms_p95": sorted(changed)[int(0.95 * (len(changed) - 1))],
        "unchanged_ms": statistics.median(_times(lambda: once(kept), flags.rounds)),
        "hops": len(chain.hops),
        "expected_seconds": chain.expected_seconds,
    }
    return {**row, **_memory(once)}


def _times(action: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        begun = time.perf_counter()
        action()
        taken.append((time.perf_counter() - begun) * 1e3)
    return taken


def _memory(once: Callable[[Distances], object]) -> dict[str, float]:
    """The memory kept between choices, and the peak of the first choice beyond the records."""
    tracemalloc.start()
    distances = Distances()
    once(distances)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"kept_mb": kept / 1e6, "peak_mb": peak / 1e6}
