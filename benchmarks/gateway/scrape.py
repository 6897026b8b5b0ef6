"""The time of a scrape: of a node and of a gateway that see a large swarm.

    python -m benchmarks scrape [--servers 300] [--json FILE]

One process, no network.  A scrape is the description of the swarm, the reading of all metrics, and their
text; each is done again and again, the median counts.  All of it takes the interpreter's lock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from benchmarks.lib.results import Run
from client.gateway.telemetry.metrics import GatewayMetrics, ScrapedGateway
from client.metrics.families import ROUTES
from client.session.trace import Event
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.meters import BatchMeters, ServingMeters
from node.monitor.metrics.node import NodeMetrics
from node.network.host import Host
from node.network.streams import Traffic
from node.runtime.faults import Faults
from routing.names import PeerId
from routing.view.description import describe
from routing.view.records import Record
from routing.view.view import Entry, SwarmView

ROUNDS = 50
BLOCKS, SPAN = 80, 10
FORMATS = {"text": "", "openmetrics": "application/openmetrics-text; version=1.0.0"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scrape", description=__doc__)
    parser.add_argument("--servers", type=int, default=300)
    parser.add_argument("--json", type=Path)
    flags, run = parser.parse_args(arguments), Run()
    result = {"servers": float(flags.servers), **measure(view_of(flags.servers))}
    for name, value in result.items():
        print(f"  {name:24} {value:.4g}")
    run.write(flags.json, result)
    return 0


def measure(view: SwarmView) -> dict[str, float]:
    """Medians in milliseconds, and the sizes in bytes."""
    rtts = {record.peer: 0.01 for record in view.records()}
    node, gateway = a_node(view), a_gateway()
    result = {"describe_ms": timed(lambda: describe(view, rtts))}
    for name, accept in FORMATS.items():
        result[f"node_{name}_ms"] = timed(partial(scrape_node, node, accept))
        result[f"gateway_{name}_ms"] = timed(partial(scrape_gateway, gateway, view, accept))
    result["node_bytes"] = float(len(scrape_node(node, "")))
    result["gateway_bytes"] = float(len(scrape_gateway(gateway, view, "")))
    return result


def scrape_node(node: NodeMetrics, accept: str) -> bytes:
    """The text of a node's scrape."""
    return exposition(node.sheet(), accept)[1]


def scrape_gateway(gateway: GatewayMetrics, view: SwarmView, accept: str) -> bytes:
    """The text of a gateway's scrape, the description of its swarm made anew."""
    rtts = {record.peer: 0.01 for record in view.records()}
    state = ScrapedGateway(1, 0, True, "llama", "r1", describe(view, rtts))
    return gateway.scrape(state, accept)[1]


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call, the median of ROUNDS."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found) * 1e3


def view_of(servers: int) -> SwarmView:
    """A swarm of one model, whose servers hold SPAN blocks each."""
    records = [
        Record(
            peer=PeerId(f"12D3KooW{number:044}"), role="serve", name=f"server {number}", model="llama",
            revision="r1", blocks=BLOCKS, start=number * SPAN % BLOCKS, stop=number * SPAN % BLOCKS + SPAN,
            seconds_per_block=0.002, prefill_seconds_per_token=1e-4, queue=0.5, dtype="bfloat16",
        )
        for number in range(servers)
    ]  # fmt: skip
    return SwarmView("public", entries={record.peer: Entry(record, b"", 0.0) for record in records})


def a_node(view: SwarmView) -> NodeMetrics:
    """A node that sees this swarm, before it serves; the parts of a server are a few numbers more."""
    host = SimpleNamespace(peer_id=PeerId("me"), faults=Faults(), traffic=Traffic(), connections=[])
    meters = ServingMeters(batches=BatchMeters())
    rtts = {record.peer: 0.01 for record in view.records()}
    return NodeMetrics("serve", cast(Host, host), meters, facts=lambda: describe(view, rtts))


def a_gateway() -> GatewayMetrics:
    """Counters of a gateway that has answered on every route, over chains of eight hops."""
    metrics = GatewayMetrics()
    listen = metrics.sessions.listener()
    listen(Event(0.0, "step", {"tokens": 1, "seconds": 0.02, "hops": [(0.01, 0.01)] * 8}))
    for route in ROUTES:
        for status in (200, 400, 429, 503):
            metrics.answered(route, status)
        request = SimpleNamespace(
            route=route, prompt_tokens=10, cached_tokens=0, completion_tokens=2, queued_seconds=0.0
        )
        metrics.request_began(request)
        metrics.first_token(request)
        metrics.token(request)
        metrics.ended(request)
    return metrics
