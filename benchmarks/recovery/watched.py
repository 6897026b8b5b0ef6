"""A generation watched token by token, and its events.

Times are seconds of `time.perf_counter()`, which the trace of a conversation uses too.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from benchmarks.decode.decode import TEXT
from benchmarks.lib.processes import ProcessError
from benchmarks.recovery.replicas import Fault, Replica, ReplicatedSwarm
from client.config import ClientConfig
from client.generation.conversation import Conversation
from client.swarm import Swarm, open_swarm
from node.model.checkpoint.source import cache_dir, resolve
from routing.chains.search import NoChain
from tensor_codec.adapters import AdapterContent
from tensor_codec.errors import PeerFault, Refused

LOOK_SECONDS = 0.001
WARM_UP_TOKENS = 8
WHOLE_SECONDS = 120.0
FOLLOW_SECONDS = 10.0
FOLLOWED_SECONDS = 0.5
WAIT_SECONDS = 30.0  # for a chain: the default


@dataclass(slots=True)
class Watched:
    """The tokens of a generation, the time of each request, and the seconds until the token came.

    peers: of the chain, at the time of each token.
    error: the reason of an early end, error_seconds after the request for the next token.
    """

    tokens: list[int] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    error_seconds: float | None = None
    peers: list[list[str]] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """The median time of a token, the first one left out."""
        return statistics.median(self.seconds[1:])

    def gap(self, at: float, first: float) -> float:
        """The time that an event at `at` added to the next token.

        first: a usual first token.  An event at the end of a token may
        delay only the next one: the larger of the two counts.
        """
        hit, tokens = self.number_at(at), len(self.seconds)
        usual = [first] + [self.typical] * (tokens - 1)
        return max(self.seconds[n] - usual[n] for n in range(hit, min(hit + 2, tokens)))

    def number_at(self, at: float) -> int:
        """The token whose wait includes `at`, or the next token; the last one if all had come."""
        ends = (asked + seconds for asked, seconds in zip(self.asked, self.seconds, strict=True))
        return next((number for number, end in enumerate(ends) if end >= at), len(self.seconds) - 1)

    def steps_with(self, peer: str, at: float) -> int | None:
        """Tokens after `at` that were computed with a peer; None if it was in use to the end."""
        used = [peer in peers for peers in self.peers[self.number_at(at) :]]
        return None if not used or used[-1] else sum(used)

    def speeds(self, at: float) -> tuple[float, float]:
        """Tokens per second before the one of `at`, without the prompt's, and from it to the end."""
        hit = self.number_at(at)
        before, behind = self.seconds[1:hit], self.seconds[hit:]
        return len(before) / sum(before) if before else math.nan, len(behind) / sum(behind)


Before = Callable[[int], Awaitable[None]]  # called with the number of the next token


async def nothing(number: int) -> None:
    """The usual action between two tokens: nothing."""


async def watch(
    swarm: Swarm, conversation: Conversation, ids: Sequence[int], tokens: int, before: Before = nothing
) -> Watched:
    """Generate greedily; the time of `before` is left out."""
    watched = Watched()
    async with aclosing(
        swarm.generate(ids, max_new_tokens=tokens, temperature=0, conversation=conversation)
    ) as stream:
        for number in range(tokens):
            await before(number)
            began = time.perf_counter()
            try:
                token = await anext(stream)
            except StopAsyncIteration:  # the model's end token came before
                break
            except (PeerFault, Refused, NoChain) as error:
                watched.error = f"{type(error).__name__}: {error}"
                watched.error_seconds = time.perf_counter() - began
                break
            watched.tokens.append(token.id)
            watched.asked.append(began)
            watched.seconds.append(time.perf_counter() - began)
            watched.peers.append(peers_in_use(conversation))
    return watched


@asynccontextmanager
async def fresh_client(
    model: str | None, replicas: ReplicatedSwarm, give_up_seconds: float = 120.0, *, standby: bool = False
) -> AsyncIterator[Swarm]:
    """A client that has seen no fault, once it knows every server as it is now.  Raises ProcessError.

    standby: see `ClientConfig`.
    """
    wait_seconds = min(WAIT_SECONDS, give_up_seconds)
    config = ClientConfig(
        tuple(replicas.peers),
        model,
        threads=1,
        wait_seconds=wait_seconds,
        give_up_seconds=give_up_seconds,
        standby=standby,
    )
    async with open_swarm(config) as swarm:
        await until_known(swarm, replicas.whole)
        yield swarm


async def until_followed(conversation: Conversation) -> None:
    """Wait until every hop has a standby that is fed, and a moment for it to follow.  Bounded."""
    assert conversation.session is not None
    route = conversation.session.core.route
    with trio.move_on_after(FOLLOW_SECONDS):
        while len(route.standbys.fed_in(route.epoch)) < len(route.hops):  # noqa: ASYNC110  no event tells
            await trio.sleep(LOOK_SECONDS)
        await trio.sleep(FOLLOWED_SECONDS)


async def until_known(swarm: Swarm, condition: Callable[..., bool]) -> None:
    """Wait until a client's view fulfils a condition.  Raises ProcessError."""
    with trio.move_on_after(WHOLE_SECONDS):
        while not condition(swarm.view()):  # noqa: ASYNC110  what processes do is no event here either
            await trio.sleep(0.02)
        return
    raise ProcessError(f"the client did not know the whole swarm after {WHOLE_SECONDS} s")


async def undisturbed(
    swarm: Swarm, ids: list[int], adapter: AdapterContent | None = None, tokens: int = WARM_UP_TOKENS
) -> Watched:
    """The second of two generations without a fault: caches are warm then."""
    watched = Watched()
    for _ in range(2):
        conversation = swarm.conversation(len(ids) + tokens, adapter=adapter)
        watched = await watch(swarm, conversation, ids, tokens)
        conversation.close()
    if watched.error is not None:
        raise ProcessError(f"a generation without a fault failed: {watched.error}")
    return watched


def prompt_ids(model: str | None, tokens: int) -> list[int]:
    """A prompt of `tokens` tokens."""
    from transformers import AutoTokenizer

    folder = resolve(model, cache_dir=cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    ids: list[int] = tokenizer(TEXT * (1 + tokens // 50))["input_ids"]
    return ids[:tokens]


def peers_in_use(conversation: Conversation) -> list[str]:
    """The peers of the chain that a conversation uses now; empty where it has no session."""
    session = conversation.session
    return [] if session is None else [hop.peer for hop in session.chain.hops]


@dataclass(slots=True)
class Strike:
    """One fault to a server of the chain in use, with its time and its peer.

    hop: of the chain; None for any.
    """

    replicas: ReplicatedSwarm
    fault: Fault
    rng: random.Random
    hop: int | None = None
    at: float = 0.0
    victim: Replica | None = None

    async def __call__(self, conversation: Conversation, delay: float = 0.0) -> None:
        """Do it, once `delay` seconds have passed and a chain is in use."""
        await trio.sleep(delay)
        while not (peers := peers_in_use(conversation)):  # noqa: ASYNC110  no event tells
            await trio.sleep(LOOK_SECONDS)
        hop = self.rng.randrange(len(peers)) if self.hop is None else self.hop
        self.victim = self.replicas.of(peers[hop])
        self.at = time.perf_counter()
        await trio.to_thread.run_sync(partial(self.fault, self.victim))


def trace_events(
    conversation: Conversation,
) -> list[Any]:  # Any: trace.Event, where there is one
    """The trace of a conversation; empty without one."""
    return list(getattr(getattr(conversation, "trace", None), "events", ()))


def trace_figures(conversation: Conversation, at: float) -> dict[str, float | None]:
    """From the trace after `at`: seconds until the fault was seen, of replay, and until the repair.

    replayed: positions that were sent again, to all hops.  None for each value outside the trace.
    """
    events = [event for event in trace_events(conversation) if event.at >= at]
    seen = next((event.at - at for event in events if event.kind == "fault"), None)
    mended = [event.data for event in events if event.kind == "recovered"]
    replayed = sum(event.data["stop"] - event.data["start"] for event in events if event.kind == "replayed")
    replay = sum(data["replay_seconds"] for data in mended) if mended else None
    return {
        "detect_s": seen,
        "replay_s": replay,
        "recovered_s": sum(data["seconds"] for data in mended) if mended else None,
        "replayed": float(replayed) if mended else None,
    }


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """The quantile `share` of the known values (nearest rank); None without a known value."""
    known = sorted(value for value in values if value is not None)
    return known[max(math.ceil(share * len(known)), 1) - 1] if known else None
