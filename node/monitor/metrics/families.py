"""The metrics of nodes and swarms by name, kind, unit and labels; a sheet of samples for one scrape.

docs/metrics.md has the same table: tests/unit/test_metrics_page.py compares them.  Names follow Prometheus'
rules: the prefix `raceme_`, base units at the end, `_total` after counters.  Each label has a closed set of
values, or a bound of their number; peer ids stand in gauges alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client.utils import floatToGoString

from node.monitor.metrics.histogram import Histogram
from node.monitor.metrics.meters import KINDS, REASONS
from routing.names import PeerId

MAX_TEXT = 64  # characters of a text that other peers have chosen

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    name: whole, but without the `_total` of a counter.  unit: "" for a number of things.
    labels: each with the set of its values, for people.
    """

    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The name in queries; of a histogram without `_bucket`, `_sum` and `_count`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _any(*values: str) -> str:
    return ", ".join(values)


_KIND = {"kind": _any(*KINDS)}
_REASON = {"reason": _any(*REASONS)}
_MODEL = {"model": "16 models at most", "revision": "of the model"}
_PEER = {"peer": "last 8 characters of the id, 256 peers at most", "name": "of the server"}
STATES = ("joining", "online", "draining")
SWARM_STATES = (*STATES, "unreachable")

BUILD_INFO = Family(
    "raceme_build_info", "gauge", "Always 1; the labels say what runs here.",
    labels={
        "version": "of Raceme", "role": "serve, bootstrap, gateway, client", "model": "served or used",
        "revision": "of the model", "dtype": "of the computing", "quantize": "of the weights",
        "device": "cpu, cuda, cuda:1, mps, a list of them",
    },
)  # fmt: skip
NODE_STATE = Family("raceme_node_state", "gauge", "1 for the node's present state.",
                    labels={"state": _any(*STATES)})  # fmt: skip
NODE_BLOCK_START = Family("raceme_node_block_start", "gauge", "First block that the node serves.")
NODE_BLOCK_STOP = Family("raceme_node_block_stop", "gauge", "Block after the last one that the node serves.")
NODE_MOVES = Family("raceme_node_moves", "counter", "Moves to other blocks.")
NODE_MOVES_FAILED = Family(
    "raceme_node_moves_failed", "counter", "Moves after which the old blocks were served."
)
NODE_SESSIONS = Family("raceme_node_sessions", "gauge", "Open sessions.")
NODE_THREADS = Family("raceme_node_threads", "gauge", "Threads that compute, in each process of the node.")
NODE_SESSIONS_REFUSED = Family(
    "raceme_node_sessions_refused", "counter", "Sessions that were refused, or ended by a refusal.",
    labels=_REASON,
)  # fmt: skip
NODE_REQUESTS_REFUSED = Family(
    "raceme_node_requests_refused", "counter", "Requests for forward and backward that were refused.",
    labels=_REASON,
)  # fmt: skip
NODE_CACHE = Family("raceme_node_cache_tokens", "gauge", "Tokens that the KV cache holds at most.", "tokens")
NODE_CACHE_FREE = Family(
    "raceme_node_cache_free_tokens", "gauge", "Tokens of free pages of the KV cache.", "tokens"
)
NODE_JOURNAL = Family(
    "raceme_node_journal_tokens", "gauge", "Tokens of outputs that are kept for a replay.", "tokens"
)
NODE_WAITING = Family("raceme_node_waiting_steps", "gauge", "Steps and requests that wait or are computed.")
NODE_QUEUE = Family(
    "raceme_node_queue_ratio", "gauge", "Mean wait of a decode step as a multiple of its computing.", "ratio"
)
NODE_BATCHES = Family("raceme_node_batches", "counter", "Batches that were computed.", labels=_KIND)
NODE_BATCH_ROWS = Family(
    "raceme_node_batch_rows",
    "histogram",
    "Rows of a batch; each token of a decode step is one.",
    labels=_KIND,
)
NODE_BATCH_SECONDS = Family(
    "raceme_node_batch_seconds", "histogram", "Time to compute a batch.", "seconds", _KIND
)
NODE_TOKENS = Family(
    "raceme_node_tokens", "counter", "Rows times tokens that were computed through the node's blocks.",
    "tokens", _KIND,
)  # fmt: skip
NODE_STEP_WAIT = Family(
    "raceme_node_step_wait_seconds", "histogram", "Time from a decode step's arrival to its batch.", "seconds"
)
NODE_PER_BLOCK = Family(
    "raceme_node_seconds_per_block", "gauge",
    "Time of a block, as announced: of a decode step, and of one token of a prefill.",
    labels={"kind": _any("decode", "prefill")},
)  # fmt: skip
NODE_REPLAYED = Family(
    "raceme_node_replayed_tokens", "counter", "Tokens of replays after the loss of a hop.", "tokens",
    {"direction": _any("sent", "computed")},
)  # fmt: skip
NODE_FAULTS = Family(
    "raceme_node_peer_faults", "counter", "Faults of peers, by the class of the error.",
    labels={"error": "classes of PeerFault"},
)  # fmt: skip
NODE_BANNED = Family("raceme_node_banned_peers", "gauge", "Peers that are banned now.")
NODE_CONNECTIONS = Family("raceme_node_connections", "gauge", "Connections to peers.")
NODE_SENT = Family("raceme_node_sent_bytes", "counter", "Bytes of frames sent to peers.", "bytes")
NODE_RECEIVED = Family(
    "raceme_node_received_bytes", "counter", "Bytes of frames received from peers.", "bytes"
)
NODE_RELAYED = Family(
    "raceme_node_relayed_bytes", "counter", "Bytes carried between other peers, both ways.", "bytes"
)
NODE_SCRAPE = Family(
    "raceme_scrape_seconds", "gauge", "Time that the scrape before this one took.", "seconds"
)

SWARM_SERVERS = Family(
    "raceme_swarm_servers", "gauge", "Servers, as this process sees the swarm.",
    labels={"state": _any(*SWARM_STATES)},
)  # fmt: skip
SWARM_BLOCK_MIN = Family(
    "raceme_swarm_block_servers_min", "gauge", "Servers of the block that has the fewest.", labels=_MODEL
)
SWARM_MISSING = Family("raceme_swarm_blocks_missing", "gauge", "Blocks that nobody serves.", labels=_MODEL)
SWARM_CAPACITY = Family(
    "raceme_swarm_capacity_tokens_per_second", "gauge",
    "Tokens per second of all chains together, one session at a time in each server.", labels=_MODEL,
)  # fmt: skip
SWARM_BOUND = Family(
    "raceme_swarm_bound_tokens_per_second", "gauge",
    "The same, if the servers were placed as well as they can be.", labels=_MODEL,
)  # fmt: skip
SERVER_UP = Family(
    "raceme_swarm_server_up", "gauge", "1 for a server that is online and answers.", labels=_PEER
)
SERVER_RTT = Family("raceme_swarm_server_rtt_seconds", "gauge", "Round trip to a server.", "seconds", _PEER)
SERVER_QUEUE = Family(
    "raceme_swarm_server_queue_ratio", "gauge",
    "Mean wait of a decode step at a server as a multiple of its computing.", "ratio", _PEER,
)  # fmt: skip
SERVER_PER_BLOCK = Family(
    "raceme_swarm_server_seconds_per_block", "gauge", "Time of a decode step in a block of a server.",
    labels=_PEER,
)  # fmt: skip
SERVERS_UNTRACKED = Family(
    "raceme_swarm_servers_untracked",
    "gauge",
    "Servers beyond the first 256, which have no series of their own.",
)

NODE_FAMILIES = (
    BUILD_INFO, NODE_STATE, NODE_BLOCK_START, NODE_BLOCK_STOP, NODE_MOVES, NODE_MOVES_FAILED, NODE_THREADS,
    NODE_SESSIONS, NODE_SESSIONS_REFUSED, NODE_REQUESTS_REFUSED, NODE_CACHE, NODE_CACHE_FREE, NODE_JOURNAL,
    NODE_WAITING,
    NODE_QUEUE, NODE_BATCHES, NODE_BATCH_ROWS, NODE_BATCH_SECONDS, NODE_TOKENS, NODE_STEP_WAIT,
    NODE_PER_BLOCK, NODE_REPLAYED, NODE_FAULTS, NODE_BANNED, NODE_CONNECTIONS, NODE_SENT, NODE_RECEIVED,
    NODE_RELAYED, NODE_SCRAPE,
)  # fmt: skip
SWARM_FAMILIES = (SWARM_SERVERS, SWARM_BLOCK_MIN, SWARM_MISSING, SWARM_CAPACITY, SWARM_BOUND)
SERVER_FAMILIES = (SERVER_UP, SERVER_RTT, SERVER_QUEUE, SERVER_PER_BLOCK, SERVERS_UNTRACKED)


class Sheet:
    """The samples of one scrape, by family, in the order in which they come.

    Samples are written out as they come: prometheus_client's own writer takes three times as long, which is
    25 ms for a gateway in a swarm of 300 servers.  tests/unit/test_metrics.py compares the two.
    """

    def __init__(self) -> None:
        self._lines: dict[str, tuple[Family, list[str]]] = {}
        self._seen: set[str] = set()

    def put(self, family: Family, value: float | None, **labels: str) -> None:
        """Add one sample, where there is a value; a second one of equal labels is left out."""
        if value is None:
            return
        name = f"{family.shown}{_in_braces(family, labels)}"
        if name in self._seen:
            return
        self._seen.add(name)
        self._lines_of(family).append(f"{name} {_number(value)}\n")

    def histogram(self, family: Family, histogram: Histogram, **labels: str) -> None:
        """Add the buckets, the count and the sum of a histogram."""
        lines, counts, name = self._lines_of(family), histogram.cumulative(), family.name
        braces = _in_braces(family, labels)
        before = f"{name}_bucket{braces[:-1]}," if labels else f"{name}_bucket{{"
        for bound, count in zip((*histogram.bounds, math.inf), counts, strict=True):
            lines.append(f'{before}le="{_number(bound)}"}} {count}.0\n')
        lines.append(f"{name}_count{braces} {counts[-1]}.0\n")
        lines.append(f"{name}_sum{braces} {_number(histogram.total)}\n")

    def text(self, *, is_open: bool) -> str:
        """All samples with their HELP and TYPE.  is_open: as OpenMetrics, without its end."""
        parts: list[str] = []
        for family, lines in self._lines.values():
            name = family.name if is_open else family.shown
            parts.append(f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n")
            if is_open and family.unit and name.endswith(f"_{family.unit}"):
                parts.append(f"# UNIT {name} {family.unit}\n")
            parts += lines
        return "".join(parts)

    def _lines_of(self, family: Family) -> list[str]:
        if (found := self._lines.get(family.name)) is None:
            found = self._lines[family.name] = family, []
        return found[1]


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _in_braces(family: Family, labels: Mapping[str, str]) -> str:
    """The labels of a sample, in the order of the family's."""
    assert labels.keys() == family.labels.keys(), f"{family.name} has the labels {list(family.labels)}"
    if not labels:
        return ""
    pairs = []
    for name in family.labels:
        value = labels[name]
        if '"' in value or "\\" in value or "\n" in value:
            value = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        pairs.append(f'{name}="{value}"')
    return "{" + ",".join(pairs) + "}"


def text(of_a_peer: str, most: int = MAX_TEXT) -> str:
    """A text that another peer has chosen, harmless and short."""
    return "".join(each if each.isprintable() else "?" for each in of_a_peer[:most])


def short(peer: PeerId | str) -> str:
    """The last 8 characters of a peer id: enough to tell peers apart."""
    return peer[-8:]
