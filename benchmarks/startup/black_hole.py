"""A server with a record and without an answer, for benchmarks of its cost to others.

Its address is a listening socket with a full queue: Linux drops every request for a connection.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

import trio

from node.network.directory.directory import DirectoryConfig, open_directory
from node.network.host import open_host
from node.network.transport.identity import load_or_create_identity

_FILL = 4  # connections that fill a queue of length 0


@contextmanager
def vanishing_address() -> Iterator[str]:
    """A multiaddr on loopback that answers nothing, not even with a refusal."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        filling = [socket.socket() for _ in range(_FILL)]
        try:
            for each in filling:
                each.setblocking(False)
                each.connect_ex(hole.getsockname())
            yield f"/ip4/127.0.0.1/tcp/{hole.getsockname()[1]}"
        finally:
            for each in filling:
                each.close()


@asynccontextmanager
async def black_holed_server(peers: list[str]) -> AsyncIterator[None]:
    """While the block lasts, one more server, of the whole model and out of reach.

    It claims to be as fast as the fastest.
    """
    identity = load_or_create_identity(None)
    with vanishing_address() as address:
        async with (
            open_host(identity=identity, listen=(), announce=[address]) as host,
            open_directory(
                host,
                identity,
                DirectoryConfig(swarm=host.swarm_id, bootstrap=tuple(peers), role="serve", kademlia=False),
            ) as us,
        ):
            fastest = min(
                (record for record in us.view().records() if record.role == "serve"),
                key=lambda record: record.seconds_per_block,
            )
            await us.announce(replace(fastest, start=0, stop=fastest.blocks, name="black hole", rtt={}))
            yield
            await us.leave()


async def _on_and_off(peers: list[str], how_many: int) -> None:
    """Each line of standard input turns the servers on, or off again; a line answers when it is done."""
    lines = trio.wrap_file(sys.stdin)
    while await lines.readline():
        off = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(how_many):
                await nursery.start(partial(_until, off, peers))
            print(json.dumps("on"), flush=True)
            await lines.readline()
            off.set()
        print(json.dumps("off"), flush=True)


async def _until(
    off: trio.Event, peers: list[str], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    async with black_holed_server(peers):
        task_status.started()
        await off.wait()


if __name__ == "__main__":
    trio.run(_on_and_off, *json.loads(sys.argv[1]))
