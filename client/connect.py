"""Read this first: from `connect` to tokens.

    async with client.connect(peers=["/ip4/.../tcp/.../p2p/..."]) as swarm:
        async for token in swarm.generate("The capital of France is"):
            print(token.text, end="", flush=True)

    with client.connect_sync(peers=["/ip4/.../tcp/.../p2p/..."]) as swarm:  # a script, a notebook
        for token in swarm.generate("The capital of France is"):
            print(token.text, end="", flush=True)

`connect` joins the swarm as a node that serves nothing, loads the model's embeddings, norm and
head, and gives a `Swarm`.  Under trio everything runs in the caller's own event loop.  Elsewhere a proxy
(`client.bridges`) leads each call to a `Swarm` in a trio thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import sniffio

from client.config import ClientConfig, client_config
from client.swarm import open_swarm

if TYPE_CHECKING:
    from client.api import SwarmLike, SyncSwarm

P = ParamSpec("P")
T = TypeVar("T")


def _configured_by(
    config_of: Callable[P, ClientConfig],
) -> Callable[[Callable[[ClientConfig], T]], Callable[P, T]]:
    """Give a function of a config the arguments of `config_of`, so that they stand in one place."""

    def decorate(function: Callable[[ClientConfig], T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **arguments: P.kwargs) -> T:
            return function(config_of(*args, **arguments))

        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(config_of).replace(return_annotation=returned)
        vars(call)["__signature__"] = signature
        return call

    return decorate


@_configured_by(client_config)
def connect(config: ClientConfig) -> AbstractAsyncContextManager[SwarmLike]:
    """Join a swarm as a client: `async with connect(...) as swarm`.

    model: a folder, a hub id, or a built-in name; None for the default model.
    peers: multiaddrs (with /p2p/ID) of one or more nodes of the swarm, bootstrap nodes or others.
    swarm_key: a key file, or the key's 32 bytes, where the swarm is private.
    max_disk_bytes: of all models in the cache; those unused for longest make room, never one in use.
    threads: of torch in this process; None leaves them as they are.
    device, dtype: of embedding, norm and head, which are the client's part: "cpu" ("cuda", "cuda:1", "mps",
    "auto") and "auto" ("float32", "bfloat16", "float16"), which is float32 on the CPU.  A large head reads
    gigabytes for each token: a GPU does so in the time of a block.
    wait_seconds, step_seconds, give_up_seconds: see `ClientConfig`.
    constraints: servers that may be used or may not, and the number of hops of a chain; they hold for
    sessions, `generate`, `forward` and `backward`, and for replacements of servers that failed.
    max_session_tokens: rows times positions of the longest session to open; None: the bound of the model
    and the servers.  max_step_tokens, max_frame_bytes: of one step, or one request of `forward` and
    `backward`; larger ones than the usual (see `Limits`) need servers that were started with as much.
    standby: every hop of a session gets a warm standby, where another peer serves its blocks: the death of
    a server costs no replay then, and standbys compute every token once more.
    monitor: ping more servers from the start (see `Swarm.liveness`), for a page that shows the swarm.  Works
    under trio, and under asyncio (any event loop) through a trio thread of its own; the handle has the same
    methods.  Raises ConfigError: on the call for a value that cannot be (a bad address, a number out of
    range, constraints that nothing can meet), on entry if the model is not found, no peer could be reached,
    or the swarm does not accept the key.
    """
    return _Connection(config)


@_configured_by(client_config)
def connect_sync(config: ClientConfig) -> SyncSwarm:
    """Join a swarm from a script or a notebook: `with connect_sync(...) as swarm`; every call blocks.

    The arguments are those of `connect`, and the handle's methods too, without `await` and `async`.
    Joins on the call; `swarm.close()`, the end of the `with` or the end of the program leaves.
    The swarm runs in a thread of its own, so any thread may use it, even a thread with a running event loop.
    Raises ConfigError, on the call.
    """
    from client.bridges.sync import open_sync

    return open_sync(config, open_swarm)


class _Connection:
    """Chooses, on entry, the event loop's own way in."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._inner: AbstractAsyncContextManager[SwarmLike] | None = None

    async def __aenter__(self) -> SwarmLike:
        if sniffio.current_async_library() == "trio":
            self._inner = open_swarm(self._config)
        else:
            from client.bridges.asyncio_swarm import open_bridge

            self._inner = open_bridge(self._config, open_swarm)
        return await self._inner.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> bool | None:  # Any: passed on as it comes
        inner, self._inner = self._inner, None
        return await inner.__aexit__(*exc_info) if inner is not None else None
