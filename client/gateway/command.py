"""Read this first: `python -m client gateway` from its flags to its end.

the client joins the swarm (`client.connect`, trio in a thread of its own)
uvicorn listens, on uvloop: /health says 200, /ready 503
a token is computed: /ready says 200
SIGTERM: /ready says 503, no new requests; those that run have `drain_seconds`; exit code 0
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

import uvicorn
import uvloop
from starlette.types import ASGIApp

from client.api import SwarmLike
from client.arguments import constraints_of
from client.connect import connect
from client.gateway.app import create_app
from client.gateway.door.hosts import check_origins
from client.gateway.door.keys import KeyRing
from client.gateway.door.limits import HttpLimits
from client.gateway.door.protocol import bounded
from client.gateway.gateway import Gateway
from client.gateway.language import Language
from client.gateway.listeners import NoMetrics
from client.gateway.monitor import Monitor
from client.gateway.served import read_adapters, served_models
from client.gateway.settings import CHAIN_SECONDS, GIVE_UP_SECONDS, GatewaySettings
from client.gateway.telemetry.metrics import GatewayMetrics
from client.gateway.telemetry.spans import open_spans
from node.config import ConfigError
from node.runtime.console import fail, say
from routing.chains.hops import NoChain
from tensor_codec.errors import PeerFault, Refused

log = logging.getLogger("raceme")

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"  # OpenTelemetry's own, as its SDK has it
BACKLOG = 512
WARM_UP_SECONDS = 60.0  # for one token: kernels are compiled at the first
TRY_AGAIN_SECONDS = 2.0  # after a token that failed


class Stopped(Exception):
    """A signal came before the gateway was up."""


def serve(flags: argparse.Namespace, settings: GatewaySettings) -> int:
    """Run the gateway; returns the exit code: 0 after a signal, 3 without a chain in time.

    Raises ConfigError.
    """
    try:
        check_origins(settings.cors_origins)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    keys = KeyRing(settings.key_file)
    with listening_socket(settings) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(flags, settings, keys, listener))
        except Stopped:
            return 0
        except NoChain as error:
            return fail(error, 3)
        except (PeerFault, Refused) as error:
            return fail(error, 4)
    return 0


@contextlib.contextmanager
def listening_socket(settings: GatewaySettings) -> Iterator[socket.socket]:
    """The socket, bound before anything is fetched or joined.  Raises ConfigError."""
    where = f"--host {settings.host} --port {settings.port}"
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror or error}") from None
        yield listener


async def _serve(
    flags: argparse.Namespace, settings: GatewaySettings, keys: KeyRing, listener: socket.socket
) -> None:
    signals, spans = Signals(keys), open_spans(flags.otlp_endpoint or os.environ.get(OTLP_VARIABLE))
    with signals.handled():
        async with joined(flags, signals) as swarm:
            adapters = await asyncio.to_thread(read_adapters, settings.adapters, swarm)
            served = served_models(swarm, settings.served_name, adapters, int(time.time()))
            metrics = None if settings.metrics == "off" else GatewayMetrics()
            monitor = Monitor(swarm, listener=None if metrics is None else metrics.sessions.listener)
            language = await asyncio.to_thread(Language, swarm.local_model, swarm.info.vocab_size)
            counted = metrics or NoMetrics()
            gateway = Gateway(swarm, settings, served, keys, language, monitor, counted, spans)
            async with gateway.background():
                await _run(gateway, create_app(gateway), listener, signals)
            await asyncio.to_thread(spans.close)


@asynccontextmanager
async def joined(flags: argparse.Namespace, signals: Signals) -> AsyncIterator[SwarmLike]:
    """The swarm of the flags.  Raises ConfigError, and Stopped for a signal while it is joined."""
    connection = connect(
        flags.model,
        peers=flags.peers,
        swarm_key=flags.swarm_key,
        identity=flags.identity,
        max_disk_bytes=flags.max_disk,
        threads=flags.threads,
        device=flags.device,
        dtype=flags.dtype,
        wait_seconds=CHAIN_SECONDS,
        give_up_seconds=GIVE_UP_SECONDS,
        codec=flags.codec,
        max_session_tokens=flags.max_session_tokens,
        constraints=constraints_of(flags),
        standby=flags.standby,
        monitor=True,
    )
    entering = asyncio.ensure_future(connection.__aenter__())
    stop = asyncio.ensure_future(signals.stop.wait())
    try:
        await asyncio.wait({entering, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            entering.cancel()
            with suppress(asyncio.CancelledError):
                await entering
            raise Stopped
        swarm = await entering
    finally:
        stop.cancel()
    try:
        yield swarm
    finally:
        await connection.__aexit__(None, None, None)


async def _run(gateway: Gateway, app: ASGIApp, listener: socket.socket, signals: Signals) -> None:
    """Serve until a signal, or until the swarm is not complete in time.  Raises NoChain."""
    settings = gateway.settings
    server = Server(uvicorn_config(app, settings.http))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    warming = asyncio.create_task(warm_up(gateway))
    stop = asyncio.ensure_future(signals.stop.wait())
    address = listener.getsockname()
    say(f"listening at {url_of(address)}; OPENAI_BASE_URL={url_of(address)}/v1")
    try:
        await asyncio.wait({serving, warming, stop}, return_when=asyncio.FIRST_COMPLETED)
        if warming.done() and not stop.done() and not serving.done():
            warming.result()  # raises NoChain
            say(f"ready: {', '.join(gateway.served.models)}")
            await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gateway.drain()
        warming.cancel()
        stop.cancel()
        await _drain(gateway, server, serving, signals)
        with suppress(asyncio.CancelledError, Exception):
            await warming


async def _drain(gateway: Gateway, server: Server, serving: asyncio.Task[None], signals: Signals) -> None:
    """Let the requests that run end, for `drain_seconds` or until the next signal."""
    again = asyncio.ensure_future(signals.again.wait())
    deadline = asyncio.get_running_loop().time() + gateway.settings.http.drain_seconds
    try:
        while gateway.active and not again.done() and asyncio.get_running_loop().time() < deadline:
            await asyncio.wait({again}, timeout=0.05)
        gateway.stop_running()
        server.end()
        await serving
    finally:
        again.cancel()


async def warm_up(gateway: Gateway) -> None:
    """Compute a token, so that the first caller need not wait for compilers.

    Raises NoChain where no chain comes up within `wait_seconds`, unless the gateway is lazy.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + gateway.settings.wait_seconds
    announced = False
    while True:
        try:
            async with asyncio.timeout(WARM_UP_SECONDS):
                tokens = gateway.swarm.generate(
                    [_warm_token(gateway.swarm)], max_new_tokens=1, do_sample=False
                )
                async with aclosing(tokens):
                    async for _ in tokens:
                        pass
            gateway.warmed_up()
            return
        except (NoChain, PeerFault, Refused, TimeoutError) as error:
            if not gateway.settings.lazy and loop.time() >= deadline:
                if isinstance(error, TimeoutError):
                    raise Refused(f"no token within {WARM_UP_SECONDS:g} s") from None
                raise
            if not announced:
                say(f"waiting for the swarm: {error}")
                announced = True
        await asyncio.sleep(TRY_AGAIN_SECONDS)


def _warm_token(swarm: SwarmLike) -> int:
    return min(swarm.local_model.eos_ids, default=0)


def uvicorn_config(app: ASGIApp, limits: HttpLimits) -> uvicorn.Config:
    """uvicorn without its own log, headers and signals, within the limits."""
    return uvicorn.Config(
        app,
        loop="none",
        http=bounded(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=5,
    )


class Server(uvicorn.Server):
    """uvicorn's server; signals are the command's, so that the exit code is its own too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def end(self) -> None:
        """End soon."""
        self.should_exit = True


@dataclass(slots=True)
class Signals:
    """SIGTERM and Ctrl-C end the gateway, the second one at once; SIGHUP reads the keys again."""

    keys: KeyRing
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    again: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals within the block; for the running event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self.keys.reload)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        (self.again if self.stop.is_set() else self.stop).set()


def url_of(address: tuple[object, ...]) -> str:
    """The URL of a bound address."""
    host, port = str(address[0]), address[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
