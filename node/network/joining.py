"""A process in the swarm's network: its host and its directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from node.config import NetworkConfig
from node.network.directory.directory import Directory, DirectoryConfig, open_directory
from node.network.host import Host, open_host
from node.network.transport.identity import Identity, held_identity
from node.network.transport.membership import load_swarm_key, swarm_id
from routing.view.records import Role


@dataclass(frozen=True, slots=True)
class Joined:
    """A process that has joined.  Made by `join`."""

    host: Host
    directory: Directory
    identity: Identity


@asynccontextmanager
async def join(config: NetworkConfig, role: Role) -> AsyncIterator[Joined]:
    """Take part in a swarm's network until the end of the block.  Raises ConfigError."""
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
                    swarm=swarm_id(key),
                    bootstrap=config.peers,
                    role=role,
                    limits=config.limits,
                    patience_seconds=config.patience_seconds,
                ),
            ) as directory,
        ):
            yield Joined(host, directory, identity)
