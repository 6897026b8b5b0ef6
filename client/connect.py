"""Read this first: from `connect` to tokens.

    async with client.connect(peers=["/ip4/.../tcp/.../p2p/..."]) as swarm:
        async for token in swarm.generate("The capital of France is"):
            print(token.text, end="", flush=True)

`connect` joins the swarm as a node that serves nothing, loads the model's embeddings, norm and
head, and gives a `Swarm`.  Under trio everything runs in the caller's own event loop; under asyncio
(any loop) `client.bridges.asyncio_swarm` runs the same code in a trio thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import sniffio

from node.config import config_errors
from node.runtime import values
from routing.chains.alternatives import Constraints
from tensor_codec.limits import limits_with

if TYPE_CHECKING:
    from client.api import SwarmLike
from client.config import ClientConfig, _check, _key, _tokens
from client.swarm import open_swarm


def connect(
    model: str | os.PathLike[str] | None = None,
    *,
    peers: str | Iterable[str],
    swarm_key: str | os.PathLike[str] | bytes | None = None,
    identity: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    wait_seconds: float = 30.0,
    step_seconds: float = 30.0,
    give_up_seconds: float = 120.0,
    codec: str = "auto",
    constraints: Constraints | None = None,
    max_session_tokens: int | None = None,
    max_step_tokens: int | None = None,
    max_frame_bytes: int | None = None,
) -> AbstractAsyncContextManager[SwarmLike]:
    """Join a swarm as a client: `async with connect(...) as swarm`.

    model: a folder, a hub id, or a built-in name; None for the default model.
    peers: multiaddrs (with /p2p/ID) of one or more nodes of the swarm, bootstrap nodes or others.
    swarm_key: a key file, or the key's 32 bytes, where the swarm is private.
    threads: of torch in this process; None leaves them as they are.
    wait_seconds, step_seconds, give_up_seconds: see `ClientConfig`.
    constraints: servers that may be used or may not, and how many hops a chain may have; they hold
    for whatever is done with the swarm, replacements of servers that failed included.
    max_session_tokens: rows times positions of the longest session to open; None: what the model and the
    servers allow.  max_step_tokens, max_frame_bytes: of one step, or one request of `forward` and
    `backward`; more than the usual ones (see `Limits`) only servers that were started with as much take.
    Works under trio, and under asyncio (any event loop) through a trio thread of its own; the
    handle has the same methods.  Raises ConfigError: on the call for a value that cannot be (a bad address, a
    number out of range, constraints that nothing can meet), on entry where there is no such model, no peer
    could be reached, or the swarm does not accept the key.
    """
    with config_errors():
        config = ClientConfig(
            peers=values.texts("peers", peers, "multiaddrs"),
            model=None if model is None else str(values.path("model", model)),
            swarm_key=None if swarm_key is None else _key("swarm_key", swarm_key),
            identity=None if identity is None else values.path("identity", identity),
            cache_dir=None if cache_dir is None else values.path("cache_dir", cache_dir),
            threads=None if threads is None else values.whole("threads", threads, 1, values.MAX_THREADS),
            wait_seconds=values.seconds("wait_seconds", wait_seconds),
            step_seconds=values.seconds("step_seconds", step_seconds, above=True),
            give_up_seconds=values.seconds("give_up_seconds", give_up_seconds, above=True),
            codec=codec,
            constraints=Constraints() if constraints is None else constraints,
            limits=limits_with(
                max_session_tokens=_tokens("max_session_tokens", max_session_tokens),
                max_step_tokens=_tokens("max_step_tokens", max_step_tokens),
                max_frame_bytes=_tokens("max_frame_bytes", max_frame_bytes),
            ),
        )
    _check(config)
    return _Connection(config)


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

            self._inner = open_bridge(self._config)
        return await self._inner.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> bool | None:  # Any: passed on as it comes
        inner, self._inner = self._inner, None
        return await inner.__aexit__(*exc_info) if inner is not None else None
