"""A scrape in the text formats of Prometheus: 0.0.4, or OpenMetrics where the Accept header asks for it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from node.monitor.metrics.families import Sheet

OPEN_METRICS = "application/openmetrics-text"


def exposition(sheet: Sheet, accept: str) -> tuple[str, bytes]:
    """The content type and the text of these samples, and of the process's own metrics (`process_...`).

    accept: the request's Accept header, "" without one.
    """
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    ours = sheet.text(is_open=content_type.startswith(OPEN_METRICS))
    return content_type, ours.encode("utf-8", "replace") + encode(registry)  # with the end of OpenMetrics
