"""Scrapes of a node and of a gateway in which every metric has a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from client.gateway.telemetry.metrics import GatewayMetrics, ScrapedGateway
from client.metrics import families as client_families
from client.session.trace import Event
from node.monitor.metrics import families
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.meters import KINDS, BatchMeters
from node.monitor.metrics.node import NodeMetrics
from node.network.host import Host
from node.network.streams import Traffic
from node.runtime.faults import Faults
from node.serving.server import Server
from routing.blocks import Blocks
from routing.names import PeerId
from routing.view.description import describe
from routing.view.records import Record
from routing.view.view import Entry, SwarmView

NODE_FAMILIES = (*families.NODE_FAMILIES, *families.SWARM_FAMILIES)
GATEWAY_FAMILIES = (
    families.BUILD_INFO,
    families.NODE_SCRAPE,
    *families.SWARM_FAMILIES,
    *families.SERVER_FAMILIES,
    *client_families.CLIENT_FAMILIES,
    *client_families.GATEWAY_FAMILIES,
)


def view_of(servers: int, blocks: int = 30) -> SwarmView:
    """A swarm of so many servers of ten blocks each."""
    records = [
        Record(
            peer=PeerId(f"12D3KooW{number:040}"), role="serve", name=f"server {number}", model="tiny",
            revision="r1", blocks=blocks, start=number % 3 * 10, stop=number % 3 * 10 + 10,
            seconds_per_block=0.002, prefill_seconds_per_token=1e-4, queue=0.5, dtype="float32", version="1",
        )
        for number in range(servers)
    ]  # fmt: skip
    return SwarmView("public", entries={record.peer: Entry(record, b"", 0.0) for record in records})


@dataclass
class FakeDirectory:
    """A view that stays, and a round trip to each of its peers."""

    seen: SwarmView

    def view(self) -> SwarmView:
        """The swarm."""
        return self.seen

    def rtts(self) -> dict[PeerId, float]:
        """Seconds to each peer."""
        return {record.peer: 0.002 for record in self.seen.records()}


def node_metrics(servers: int = 3) -> NodeMetrics:
    """Of a node that serves blocks 0:10 in a swarm of so many servers."""
    host = SimpleNamespace(peer_id=PeerId("me"), faults=Faults(), traffic=Traffic(10, 20), connections=[1, 2])
    engine = SimpleNamespace(
        queue=0.5,
        batcher=SimpleNamespace(waiting=2),
        rates=SimpleNamespace(decode_seconds_per_block=0.002, prefill_seconds_per_block_token=1e-4),
    )
    listener = SimpleNamespace(
        engine=engine, session_count=1, journals=SimpleNamespace(held=64),
        budget=SimpleNamespace(all_tokens=4096, free_tokens=4000),
    )  # fmt: skip
    spec = SimpleNamespace(blocks=Blocks(0, 10), model="tiny", revision="r1")
    admission = SimpleNamespace(draining=False)
    span = SimpleNamespace(listener=listener, spec=spec, admission=admission, threads=2)
    setup = SimpleNamespace(
        info=SimpleNamespace(name="tiny", revision="r1"), placement="cpu",
        precision=SimpleNamespace(dtype="float32", quantize="none"),
    )  # fmt: skip
    server = SimpleNamespace(
        setup=setup, moves=1, moves_failed=0, session_count=1,
        dispatch=SimpleNamespace(served_span=span, served_spans=(span,)),
    )  # fmt: skip
    directory = FakeDirectory(view_of(servers))
    metrics = NodeMetrics(
        "serve", cast(Host, host), server=cast(Server, server),
        facts=lambda: describe(directory.view(), directory.rtts()),
    )  # fmt: skip
    metrics.meters.batches = batches = BatchMeters()
    for kind in KINDS:
        batches.computed(kind, 3, 3, 0.02)
    batches.waits.observe(0.004)
    return metrics


def node_scrape(accept: str = "", servers: int = 3) -> str:
    """What a serving node answers."""
    return exposition(node_metrics(servers).sheet(), accept)[1].decode()


@dataclass
class FakeRequest:
    """A request for tokens."""

    route: str = "/v1/chat/completions"
    prompt_tokens: int = 30
    cached_tokens: int = 20
    completion_tokens: int = 3
    queued_seconds: float = 0.2


EVENTS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("opened", {"hops": [], "codec": "fp32", "seconds": 0.2}),
    ("step", {"tokens": 30, "seconds": 0.2, "hops": [(0.1, 0.1), (0.1, 0.1)]}),
    ("step", {"tokens": 1, "seconds": 0.02, "hops": [(0.01, 0.01), (0.01, 0.01)]}),
    ("fault", {"peer": "a", "error": "PeerGone: gone", "why": "gone"}),
    ("rerouted", {"why": "gone", "kept": [], "opened": [], "hops": [], "seconds": 0.1}),
    ("replayed", {"sender": "a", "peer": "b", "start": 0, "stop": 4, "bytes": 100}),
    ("recovered", {"seconds": 0.2, "replay_seconds": 0.1}),
    ("relayed", {"sender": "a", "peer": "b"}),
    ("ended", {}),
)


def gateway_metrics() -> GatewayMetrics:
    """Of a gateway that has served one request, with a recovery, and refused one."""
    metrics, request = GatewayMetrics(), FakeRequest()
    listen = metrics.sessions.listener()
    metrics.request_began(request)
    for kind, data in EVENTS:
        listen(Event(0.0, kind, data))
    metrics.first_token(request)
    metrics.token(request)
    metrics.ended(request, 200, "client")
    metrics.answered(request.route, 200)
    metrics.rejected("queue_full")
    return metrics


def scraped_gateway(servers: int = 3) -> ScrapedGateway:
    """The present state of a gateway in a swarm of so many servers."""
    directory = FakeDirectory(view_of(servers))
    facts = describe(directory.view(), directory.rtts())
    return ScrapedGateway(active=1, queued=0, ready=True, model="tiny", revision="r1", facts=facts)


def gateway_scrape(accept: str = "", servers: int = 3) -> str:
    """What a gateway answers."""
    return gateway_metrics().scrape(scraped_gateway(servers), accept)[1].decode()


def samples_of(scrape: str) -> set[str]:
    """The names of the samples in a scrape, `_bucket` and the like included."""
    return set(re.findall(r"^([a-z_]+)(?:\{.*\})? \S+$", scrape, re.MULTILINE))


def families_of(scrape: str) -> set[str]:
    """The names that a scrape declares."""
    return set(re.findall(r"^# TYPE (\S+)", scrape, re.MULTILINE))


def names_in_queries(text: str) -> set[str]:
    """The names of our metrics in queries or in a text."""
    return set(re.findall(r"\braceme_[a-z_]+\b", text))
