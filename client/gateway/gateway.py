"""Everything that one gateway holds: the swarm, its callers, its queue, its running requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from client.api import SwarmLike
from client.gateway.door.hosts import Hosts, Origins
from client.gateway.door.keys import KeyRing
from client.gateway.door.middleware import Rules
from client.gateway.door.queue import AdmissionQueue, NoPlace
from client.gateway.door.rates import Rates
from client.gateway.jobs import Job, Running
from client.gateway.language import Language
from client.gateway.listeners import NoMetrics, NoMonitor, RequestMetrics, RequestMonitor
from client.gateway.openai.errors import shutting_down, status_of, too_many
from client.gateway.prefixes import PrefixPool
from client.gateway.requests import ActiveRequest
from client.gateway.served import ServedModels
from client.gateway.settings import CHAIN_SECONDS, GatewaySettings
from client.gateway.telemetry.spans import NoSpans, Spans
from routing.blocks import Blocks
from routing.chains.hops import NoChain

log = logging.getLogger("raceme")

LOOK_SECONDS = 1.0  # between looks at kept conversations


@dataclass(eq=False, slots=True)
class Gateway:
    """One gateway.  Belongs to one event loop; `background` runs beside its server.

    is_ready: a token has been computed since the start.  is_draining: it takes no new requests.
    """

    swarm: SwarmLike
    settings: GatewaySettings
    served: ServedModels
    keys: KeyRing
    language: Language
    monitor: RequestMonitor = field(default_factory=NoMonitor)
    metrics: RequestMetrics = field(default_factory=NoMetrics)
    spans: Spans = field(default_factory=NoSpans)
    is_ready: bool = False
    is_draining: bool = False
    active: dict[str, ActiveRequest] = field(default_factory=dict)
    admission: AdmissionQueue = field(init=False)
    prefixes: PrefixPool = field(init=False)
    rates: Rates = field(default_factory=Rates)
    _running: set[Running] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.admission = AdmissionQueue(self.settings.queue)
        self.prefixes = PrefixPool(self.settings.prefixes)

    @property
    def rules(self) -> Rules:
        """Whom it answers."""
        settings = self.settings
        return Rules(
            self.keys,
            Hosts(settings.host, settings.allowed_hosts),
            Origins(settings.cors_origins),
            settings.http.max_header_bytes,
            frozenset({"/metrics"}) if settings.metrics == "open" else frozenset(),
            self.metrics.rejected,
            self.metrics.answered,
        )

    def missing_blocks(self) -> tuple[Blocks, ...]:
        """The runs of blocks without a server."""
        return self.served.missing_blocks()

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """Close kept conversations in time, within the block and at its end; the monitor runs too."""
        task = asyncio.create_task(self._expire())
        try:
            async with self.monitor.running():
                yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            for kept in self.prefixes.clear():
                kept.conversation.close()
            self.language.close()

    @asynccontextmanager
    async def running(self, job: Job) -> AsyncIterator[Running]:
        """The answers of a job: after its turn in the queue they are computed within this block.

        Raises RequestError (429, 503), NoPlace, NoChain.
        """
        if self.is_draining:
            self.metrics.rejected("draining")
            raise shutting_down()
        request = ActiveRequest(
            job.request_id, job.kind, job.route, job.model.name, job.caller.name, time.time(),
            job.max_new_tokens, job.prompt_tokens, traced=job.traced,
        )  # fmt: skip
        clock = asyncio.get_running_loop().time
        rates = self.rates.take(job.caller, job.prompt_tokens + job.max_new_tokens, clock())
        if rates.wait_seconds:
            self.metrics.rejected("rate")
            raise too_many(
                f"{job.caller.name} has used up its requests or tokens of this minute",
                rates.wait_seconds,
                rates.headers(),
            )
        status, cancelled_by = 200, ""
        self.active[request.id] = request
        self.metrics.request_began(request)
        span = self.spans.request(request)
        try:
            lengths = [prompt.max_new_tokens for prompt in job.prompts]
            with self.monitor.request(request.id, job.kind, job.model.name, *lengths) as watch:
                began = clock()
                async with self.admission.place(job.caller.name, len(job.prompts)) as at_once:
                    request.begin(clock() - began)
                    watch.began(at_once)
                    span.began()
                    await self._wait_for_blocks()
                    running = Running(
                        self.swarm, job, request, watch, self.metrics, self.prefixes, rates.headers(),
                        self.served.kept_tokens(), span,
                    )  # fmt: skip
                    self._running.add(running)
                    try:
                        async with running.started(at_once):
                            yield running
                    finally:
                        status = running.status
                        self._running.discard(running)
        except asyncio.CancelledError:
            cancelled_by = "shutdown" if self.is_draining else "client"
            raise
        except NoPlace as error:
            self.metrics.rejected(error.why)
            status = status_of(error)
            raise
        except Exception as error:
            status = status_of(error)
            raise
        finally:
            self.active.pop(request.id, None)
            used = request.prompt_tokens + request.completion_tokens
            self.rates.give_back(job.caller, max(0, rates.tokens - used), clock())
            self.metrics.ended(request, status, cancelled_by)
            span.ended(status, cancelled_by)

    def warmed_up(self) -> None:
        """The swarm has computed a token."""
        self.is_ready = True

    def drain(self) -> None:
        """Take no new request from now on."""
        self.is_draining = True
        self.monitor.stop()

    def stop_running(self) -> None:
        """End the requests that run, each with an error that says why."""
        for running in list(self._running):
            running.stop(shutting_down())

    async def _wait_for_blocks(self) -> None:
        """Return once every block has a server.  Raises NoChain after CHAIN_SECONDS."""
        deadline = asyncio.get_running_loop().time() + CHAIN_SECONDS
        seen = self.swarm.view()
        while missing := self.missing_blocks():
            blocks = self.swarm.info.blocks
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise NoChain(missing, blocks, alone=missing == (Blocks(0, blocks),))
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.swarm.changed(seen)
            seen = self.swarm.view()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for kept in self.prefixes.expire(asyncio.get_running_loop().time()):
                kept.conversation.close()
