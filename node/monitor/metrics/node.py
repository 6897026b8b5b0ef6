"""What a node holds at the moment of a scrape; everything but the batches is read here and kept elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from node.config import VERSION
from node.monitor.metrics import families as of
from node.monitor.metrics.families import Sheet
from node.monitor.metrics.meters import KINDS, REASONS, ServingMeters
from node.monitor.metrics.swarm import put_swarm
from tensor_codec.errors import PeerFault

if TYPE_CHECKING:
    from node.network.host import Host
    from node.serving.server import Server
    from routing.view.records import State


@dataclass(slots=True)
class NodeMetrics:
    """The node that is scraped.  server: once there is one; a bootstrap node never has one.

    relayed_bytes: carried between other peers.
    meters: of the server's setup.  facts: the swarm as this node sees it, see `put_swarm`.
    """

    role: str
    host: Host
    meters: ServingMeters = field(default_factory=ServingMeters)
    server: Server | None = None
    facts: Callable[[], Mapping[str, Any]] | None = None  # Any: JSON
    relayed_bytes: Callable[[], int] = lambda: 0
    _scrape_seconds: float = 0.0

    @property
    def state(self) -> State:
        """As the node announces it."""
        span = None if self.server is None else self.server.dispatch.served_span
        if self.role != "serve":
            return "online"
        if span is None:
            return "joining"
        return "draining" if span.admission.draining else "online"

    def scraped(self, seconds: float) -> None:
        """Note how long a scrape took."""
        self._scrape_seconds = seconds

    def sheet(self) -> Sheet:
        """Every metric of the node, and its view of the swarm."""
        sheet = Sheet()
        self._put_build(sheet)
        if self.role == "serve":
            for state in of.STATES:
                sheet.put(of.NODE_STATE, float(state == self.state), state=state)
            self._put_server(sheet)
            self._put_meters(sheet)
        self._put_network(sheet)
        if self.facts is not None:
            put_swarm(sheet, self.facts())
        sheet.put(of.NODE_SCRAPE, self._scrape_seconds)
        return sheet

    def health(self) -> dict[str, Any]:  # Any: JSON
        """The node's state, for a probe."""
        span = None if self.server is None else self.server.dispatch.served_span
        found: dict[str, Any] = {  # Any: JSON
            "status": "ok",
            "role": self.role,
            "state": self.state,
            "peer": self.host.peer_id,
            "version": VERSION,
        }
        if self.role == "serve":
            found |= {
                "model": None if span is None else span.spec.model,
                "revision": None if span is None else span.spec.revision,
                "blocks": None if span is None else list(span.spec.blocks),
                "sessions": 0 if self.server is None else self.server.session_count,
            }
        return found

    def _put_build(self, sheet: Sheet) -> None:
        labels = dict.fromkeys(of.BUILD_INFO.labels, "")
        labels |= {"version": VERSION, "role": self.role}
        if self.server is not None:
            setup = self.server.setup
            labels |= {
                "model": of.text(setup.info.name),
                "revision": setup.info.revision,
                "dtype": setup.precision.dtype,
                "quantize": setup.precision.quantize,
                "device": str(setup.placement),
            }
        sheet.put(of.BUILD_INFO, 1, **labels)

    def _put_server(self, sheet: Sheet) -> None:
        if self.server is None:
            return
        sheet.put(of.NODE_MOVES, self.server.moves)
        sheet.put(of.NODE_MOVES_FAILED, self.server.moves_failed)
        sheet.put(of.NODE_SESSIONS, self.server.session_count)
        spans = self.server.dispatch.served_spans
        listeners = [span.listener for span in spans]
        sheet.put(of.NODE_CACHE, sum(each.budget.all_tokens for each in listeners))
        sheet.put(of.NODE_CACHE_FREE, sum(each.budget.free_tokens for each in listeners))
        sheet.put(of.NODE_JOURNAL, sum(each.journals.held for each in listeners))
        sheet.put(of.NODE_WAITING, sum(each.engine.batcher.waiting for each in listeners))
        if spans:  # the first one is served; another one is being left
            blocks, engine = spans[0].spec.blocks, spans[0].listener.engine
            sheet.put(of.NODE_BLOCK_START, blocks.start)
            sheet.put(of.NODE_BLOCK_STOP, blocks.stop)
            sheet.put(of.NODE_THREADS, spans[0].threads)
            sheet.put(of.NODE_QUEUE, engine.queue)
            sheet.put(of.NODE_PER_BLOCK, engine.rates.decode_seconds_per_block, kind="decode")
            sheet.put(of.NODE_PER_BLOCK, engine.rates.prefill_seconds_per_block_token, kind="prefill")

    def _put_meters(self, sheet: Sheet) -> None:
        meters = self.meters
        for reason in REASONS:
            sheet.put(of.NODE_SESSIONS_REFUSED, meters.sessions_refused[reason], reason=reason)
            sheet.put(of.NODE_REQUESTS_REFUSED, meters.requests_refused[reason], reason=reason)
        for direction in ("sent", "computed"):
            sheet.put(of.NODE_REPLAYED, meters.replayed[direction], direction=direction)
        if (batches := meters.batches) is None:
            return
        for kind in KINDS:
            sheet.put(of.NODE_BATCHES, batches.rows[kind].count, kind=kind)
            sheet.put(of.NODE_TOKENS, batches.positions[kind], kind=kind)
            sheet.histogram(of.NODE_BATCH_ROWS, batches.rows[kind], kind=kind)
            sheet.histogram(of.NODE_BATCH_SECONDS, batches.seconds[kind], kind=kind)
        sheet.histogram(of.NODE_STEP_WAIT, batches.waits)

    def _put_network(self, sheet: Sheet) -> None:
        host = self.host
        kinds = host.faults.kinds()
        for kind in sorted({*error_names(), *kinds}):
            sheet.put(of.NODE_FAULTS, kinds.get(kind, 0), error=kind)
        sheet.put(of.NODE_BANNED, len(host.faults.banned()))
        sheet.put(of.NODE_CONNECTIONS, len(host.connections))
        sheet.put(of.NODE_SENT, host.traffic.sent)
        sheet.put(of.NODE_RECEIVED, host.traffic.received)
        sheet.put(of.NODE_RELAYED, self.relayed_bytes())


def error_names() -> set[str]:
    """The names of PeerFault and of the classes below it, as far as they are loaded: a closed set."""
    found, todo = set[str](), [PeerFault]
    while todo:
        kind = todo.pop()
        found.add(kind.__name__)
        todo += kind.__subclasses__()
    return found
