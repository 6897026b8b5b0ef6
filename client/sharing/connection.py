"""Joins a swarm for its shared adapters alone: no model is loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.sharing.catalogue import Sharing
from node.config import NetworkConfig

if TYPE_CHECKING:
    from node.network.host import Host


@dataclass(frozen=True, slots=True)
class SharingHost:
    """A program in a swarm, for its adapters.  Made by `open_sharing`."""

    sharing: Sharing
    host: Host


@asynccontextmanager
async def open_sharing(config: NetworkConfig) -> AsyncIterator[SharingHost]:
    """Take part until the end of the block.  `listen` is empty for one that gives nothing.

    Raises ConfigError.
    """
    from node.network.joining import join

    async with join(config, "client") as joined:
        host, directory = joined.host, joined.directory
        sharing = Sharing(host, host.peer_id, host.swarm_id, directory.table, directory.view, config.limits)
        yield SharingHost(sharing, host)
