"""Newcomers that announce themselves, and an observer that was there before.  A worker of tests.hostile."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from node.config import VERSION, ConfigError
from node.network.directory.directory import Directory, DirectoryConfig, open_directory
from node.network.host import open_host
from node.runtime.nurseries import run
from routing.names import PeerId
from routing.view.records import Record, Role
from tensor_codec.errors import PeerFault
from tests.hostile.stage import Target, new_identity, target_of
from tests.hostile.talking import say

EVERY_SECONDS = 2.0
PATIENCE_SECONDS = 10.0


async def announce_forever(target: Target, host: str) -> None:
    """Say of each newcomer when the observer saw its record.  host: the address of both."""
    async with joined(target, host, "client") as (observer, _), trio.open_nursery() as nursery:
        say(ready=True)
        due = trio.current_time()
        while True:
            nursery.start_soon(announce, target, host, observer)
            due += EVERY_SECONDS
            await trio.sleep_until(due)


@asynccontextmanager
async def joined(target: Target, where: str, role: Role) -> AsyncIterator[tuple[Directory, PeerId]]:
    """A new peer of the swarm.  Raises ConfigError where it cannot join."""
    identity = new_identity()
    config = DirectoryConfig("public", (target.address,), role, kademlia=False, watch=False)
    async with (
        open_host(identity=identity, listen=[f"/ip4/{where}/tcp/0"]) as host,
        open_directory(host, identity, config) as directory,
    ):
        yield directory, identity.peer_id


async def announce(target: Target, where: str, observer: Directory) -> None:
    """One newcomer: it announces itself, and is waited for."""
    began, seconds, error = time.monotonic(), None, ""
    try:
        with trio.move_on_after(PATIENCE_SECONDS):
            async with joined(target, where, "bootstrap") as (directory, peer):
                await directory.announce(Record(role="bootstrap", version=VERSION))
                while (view := observer.view()).get(peer) is None:
                    await observer.changed(view)
                seconds = time.monotonic() - began
    except (ConfigError, PeerFault, OSError) as fault:
        error = f"{type(fault).__name__}: {fault}"
    say(announced=[began, seconds, error[:120]])


if __name__ == "__main__":
    target = target_of(sys.argv[1])
    run(lambda: announce_forever(target, sys.argv[2]))
