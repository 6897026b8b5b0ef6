"""A scrape in the text formats of Prometheus: 0.0.4, or OpenMetrics where the Accept header asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector


class _Given(Collector):
    """Metrics that have been read already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The metrics, once."""
        yield from self._metrics


def exposition(metrics: Iterable[Metric], accept: str) -> tuple[str, bytes]:
    """The content type and the text of these metrics, and of the process's own (`process_...`).

    accept: the request's Accept header, "" without one.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(metrics))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)
