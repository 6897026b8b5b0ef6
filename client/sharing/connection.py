"""Joins a swarm for its shared adapters alone: no model is loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from client.sharing.catalogue import Sharing
from tensor_codec.limits import Limits

if TYPE_CHECKING:
    from node.network.host import Host


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """How a program takes part.  peers: multiaddrs with /p2p/ID.  listen: none for one that gives nothing."""

    peers: tuple[str, ...]
    swarm_key: Path | None = None
    identity: Path | None = None
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Joined:
    """A program in a swarm.  Made by `join`."""

    sharing: Sharing
    host: Host


@asynccontextmanager
async def join(config: SharingConfig) -> AsyncIterator[Joined]:
    """Take part until the end of the block.  Raises ConfigError."""
    from node.network.directory.directory import DirectoryConfig, open_directory
    from node.network.host import open_host
    from node.network.transport.identity import held_identity
    from node.network.transport.membership import load_swarm_key, swarm_id

    key = load_swarm_key(config.swarm_key) if config.swarm_key is not None else None
    with held_identity(config.identity) as identity:
        async with (
            open_host(
                identity=identity,
                listen=config.listen,
                announce=config.announce,
                swarm_key=key,
                limits=config.limits,
            ) as host,
            open_directory(
                host,
                identity,
                DirectoryConfig(
                    swarm=swarm_id(key), bootstrap=config.peers, role="client", limits=config.limits
                ),
            ) as directory,
        ):
            sharing = Sharing(
                host, host.peer_id, host.swarm_id, directory.table, directory.view, config.limits
            )
            yield Joined(sharing, host)
