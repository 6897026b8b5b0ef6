"""Every setting of a gateway, besides those of its client (`client.config`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.gateway.door.limits import HttpLimits, PrefixLimits, QueueLimits

MetricsAccess = Literal["open", "key", "off"]

CHAIN_SECONDS = 10.0  # for a chain, once the gateway is ready: clients of HTTP wait for less than people do
GIVE_UP_SECONDS = 60.0  # for one token, with new chains and replays


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The settings of one gateway.

    host, port: to listen at.  key_file: of the callers' keys; None: everybody may call.
    cors_origins: web pages of these origins may call too; "*" for all.  allowed_hosts: names in the Host
    header besides those of the loopback and of `host`; "*" for all.
    served_name: of the model, in place of its own.  adapters: folders or names, each `NAME=FOLDER` or one
    of the two.  default_temperature: of requests without one.
    metrics: who may read /metrics.  lazy: wait for a complete swarm for ever.
    wait_seconds: for a complete swarm at the start.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    served_name: str | None = None
    adapters: tuple[str, ...] = ()
    default_temperature: float = 1.0
    has_page: bool = True
    metrics: MetricsAccess = "key"
    lazy: bool = False
    wait_seconds: float = 30.0
    http: HttpLimits = field(default_factory=HttpLimits)
    queue: QueueLimits = field(default_factory=QueueLimits)
    prefixes: PrefixLimits = field(default_factory=PrefixLimits)
