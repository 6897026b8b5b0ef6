"""Real nodes and a client in one process, for tests of `client.hf`: loopback sockets and real torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from client.api import SyncSwarm
from client.bridges.sync import open_sync
from client.config import ClientConfig, client_config
from client.swarm import Swarm, open_swarm
from node import main
from node.config import NetworkConfig, NodeConfig
from node.runtime.compute_thread import open_compute_thread
from node.serving.executor.rates import rates_at_start
from routing.blocks import Blocks


@dataclass
class Nodes:
    """The servers of a swarm in this process.

    scopes: the cancellation of one ends it at once.  addresses: of the first server, for another client.
    ids: the peer id of each.
    """

    swarm: SyncSwarm
    scopes: list[trio.CancelScope] = field(default_factory=list)
    addresses: Sequence[str] = ()
    ids: Sequence[str] = ()

    def kill(self, number: int) -> None:
        """End a server without a word to anybody, from any thread."""
        scope = self.scopes[number]
        assert self.swarm.run(partial(_cancel, scope)) is None


async def _cancel(scope: trio.CancelScope, swarm: Swarm) -> None:
    scope.cancel()


@contextmanager
def nodes_of(model: Path, spans: Sequence[tuple[int, int]], **settings: Any) -> Iterator[Nodes]:
    """A swarm with a server for each span of the model's blocks, and a blocking client.

    settings: of `client.connect`.
    """
    scopes: list[trio.CancelScope] = []
    addresses: list[str] = []
    ids: list[str] = []

    @asynccontextmanager
    async def opened(config: ClientConfig) -> AsyncIterator[Swarm]:
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            nursery = await stack.enter_async_context(trio.open_nursery())
            for number, blocks in enumerate(spans):
                compute = await stack.enter_async_context(open_compute_thread())
                ready = folder / f"{number}.json"
                network = NetworkConfig(peers=tuple(addresses), ready_file=ready)
                node = NodeConfig(
                    network, str(model), blocks=Blocks(*blocks),
                    dtype="float32", device="cpu", threads=1, cache_tokens=4096,
                )  # fmt: skip
                scopes.append(trio.CancelScope())
                nursery.start_soon(_serve, scopes[-1], node, compute)
                while not ready.exists():  # noqa: ASYNC110  the node tells others by this file
                    await trio.sleep(0.01)
                own = json.loads(ready.read_text())["addresses"]
                addresses[:] = addresses or own[:1]
                ids.append(own[0].rpartition("/")[2])
            joined = client_config(model, peers=addresses, **settings)
            async with open_swarm(joined) as swarm:
                yield swarm
            nursery.cancel_scope.cancel()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("RACEME_CACHE", cache)
        patch.setattr("node.serving.served_span.rates_at_start", partial(rates_at_start, seconds=0.02))
        patch.setattr("client.session.repair.watchdog.MIN_HOP_SECONDS", 20.0)  # for a busy machine
        with open_sync(cast(Any, None), opened) as swarm:
            yield Nodes(swarm, scopes, addresses, ids)


async def _serve(scope: trio.CancelScope, config: NodeConfig, compute: Any) -> None:
    with scope:
        await main._serve(config, compute, main.Stopping(trio.Event(), trio.CancelScope()))
