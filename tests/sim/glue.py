"""The only module here that names the core's entry points: where those change, this changes."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trio
from torch import Tensor

from client.chains.chain_choice import ChainChooser
from client.chains.chain_wait import ViewChanges
from client.config import ClientConfig
from client.generation.conversation import Conversation
from client.generation.generate import Generation
from client.generation.head_batches import HeadBatches
from client.session.session import Session
from client.speculation.speculation import Crowd, Speculation
from client.speculation.width import WidthPolicy
from client.swarm import Swarm
from node.model.checkpoint.info import ModelInfo
from node.network.streams import FramedStream
from node.runtime.compute_thread import Runner
from node.serving.cache_budget import CacheBudget
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates
from node.serving.sessions.listener import Listener
from node.serving.span_admission import SpanAdmission
from routing.chains.search import NoChain
from routing.names import ModelId, PeerId, Revision
from tensor_codec.blocks import Blocks
from tensor_codec.errors import CacheFull, PeerFault, Refused, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.messages.session import SESSION_PROTOCOL
from tensor_codec.span_spec import SpanSpec
from tests.fakes_serving import HIDDEN, FakeArena, FakeEmbedAndHead, FakeSpan, serve_push, some_hidden

MODEL, REVISION, DTYPE = ModelId("m"), Revision("r"), "float32"
MAX_POSITION = 4096
HOGS = 5  # a peer may have a quarter of a large budget


# The server.


def make_listener(
    span: FakeSpan,
    compute: Runner,
    pool: FakeArena,
    *,
    seconds_per_block: float,
    budget_tokens: int,
    limits: Limits,
    open_stream: Callable[[PeerId], Awaitable[FramedStream]],
) -> Listener:
    """A real listener over a real engine; the caller runs `listener.engine.run`."""
    rates = Rates(seconds_per_block, seconds_per_block)
    engine = Engine(span, compute, rates, limits, clock=lambda: time.perf_counter())  # the simulated clock
    blocks = Blocks(span.start, span.stop)
    spec = SpanSpec(MODEL, REVISION, blocks, DTYPE, hidden=HIDDEN, max_position=MAX_POSITION)
    return Listener(
        SpanAdmission(spec),
        engine,
        pool,
        CacheBudget(budget_tokens, max_session_tokens=limits.max_session_tokens),
        open_stream,
        limits,
    )


async def serve(listener: Listener, protocol: str, stream: FramedStream) -> None:
    """Serve a stream that came in.  Raises PeerFault."""
    if protocol == SESSION_PROTOCOL:
        await listener.serve_session(stream)
    else:
        await serve_push(listener, stream, listener._frames)


def left_over(listener: Listener) -> list[str]:
    """The resources that a listener without sessions still holds."""
    budget = listener.budget
    counts = {
        "sessions": listener.session_count,
        "tokens of pages": budget.tokens // budget.page_tokens * budget.page_tokens - budget.free_tokens,
        "waiting steps": listener.engine.batcher.waiting,
        "links": len(listener.pushed.links._links),
        "session ids": len(listener._sessions.places),
        "tokens of journals": listener.journals.held,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def is_hogged(listener: Listener) -> bool:
    """Whether `hog` was here."""
    return any(listener.budget.held_tokens(f"hog{number}") for number in range(HOGS))


def hog(listener: Listener) -> Callable[[], None]:
    """Take every free page, as other clients would; returns the function that gives them back."""
    budget, taken = listener.budget, []
    for number in range(HOGS):
        session, length = b"hog%d" % number, budget.peer_tokens
        while length >= budget.page_tokens:
            with suppress(CacheFull):
                budget.admit(session, f"hog{number}", 1, length)
                taken.append(session)
                budget.grow(session, length)
                break
            if session in taken:
                budget.release(taken.pop())
            length //= 2

    def give_back() -> None:
        for session in taken:
            budget.release(session)
        listener._cache_admission.wake()

    return give_back


# The client.


@dataclass(frozen=True, slots=True)
class ClientTimes:
    """How long a client waits, in seconds: for a chain, a step, a token.  standby: see `ClientConfig`."""

    wait: float
    step: float
    give_up: float
    standby: bool = False


def make_swarm(
    host: Any,  # with the methods of node.network.host that a client uses
    directory: Any,  # the same of node.network.directory.directory
    compute: Runner,
    nursery: trio.Nursery,
    *,
    blocks: int,
    limits: Limits,
    times: ClientTimes,
) -> Swarm:
    """A real client, with small integers for a model."""
    ends: Any = FakeEmbedAndHead()
    config = ClientConfig(
        peers=("somewhere",),
        wait_seconds=times.wait,
        step_seconds=times.step,
        give_up_seconds=times.give_up,
        limits=limits,
        standby=times.standby,
    )
    info = ModelInfo(
        MODEL,
        REVISION,
        "fake",
        blocks,
        HIDDEN,
        FakeEmbedAndHead.vocabulary,
        MAX_POSITION,
        (1,) * blocks,
        1,
        1,
    )
    routes = ChainChooser(
        MODEL,
        REVISION,
        blocks,
        view=directory.view,
        rtts=directory.rtts,
        dial=partial(host.open_stream, seconds=limits.dial_seconds),
        changes=ViewChanges(directory.changed, partial(directory.find_peers, REVISION, 1.0)),
        pings=directory,
        late=directory.late,
    )
    return Swarm(config, info, ends, routes, host, directory, compute, HeadBatches(ends, compute), nursery)


class Oracle:
    """Guesses the true tokens of a text, but for a share of them."""

    seconds = 0.0

    def __init__(self, tokens: list[int], wrong: float) -> None:
        self._tokens = tokens
        self._wrong = wrong
        self._rng = random.Random(sum(tokens))

    async def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """As many as were asked for, where the text has them."""
        await trio.lowlevel.checkpoint()
        true = self._tokens[len(tokens) : len(tokens) + most]
        return [25 - token if self._rng.random() < self._wrong else token for token in true]


class Wide(WidthPolicy):
    """Proposes as many tokens as it may in every step."""

    def width(self, matched: int, most: int, *, sharing: int = 1, drafting: float = 0.0) -> int:
        """All."""
        return max(0, min(most, self.most))


def guesses(tokens: list[int], wrong: float) -> Speculation:
    """Guesses of a text's tokens, of which a share is wrong."""
    return Speculation(Wide(), Crowd(), Oracle(tokens, wrong))


async def tokens_of(
    swarm: Swarm,
    conversation: Conversation,
    prompt: tuple[int, ...],
    new_tokens: int,
    guesses: Speculation | None = None,
) -> AsyncGenerator[int, None]:
    """The tokens of one generation, one by one.  guesses: None: the usual ones."""
    if guesses is None:
        made = swarm.generate(list(prompt), max_new_tokens=new_tokens, conversation=conversation)
    else:
        settings = swarm.settings(list(prompt), max_new_tokens=new_tokens, conversation=conversation)
        ends: Any = swarm.local_model
        made = Generation(ends, conversation, settings, speculation=guesses).run(list(prompt), close=False)
    async with aclosing(made) as tokens:
        async for token in tokens:
            yield token.id


def hidden_of(prompt: tuple[int, ...], count: int) -> Tensor:
    """Hidden states for a prompt's positions, and for `count` - 1 positions after it: [1, tokens, hidden]."""
    return some_hidden(len(prompt) + count - 1, seed=sum(prompt))


def sum_of(hidden: Tensor | None) -> int:
    """Of all values, which are whole numbers."""
    assert hidden is not None
    return int(hidden.sum(dtype=torch.float64))


def hops_of(session: Session) -> list[PeerId]:
    """The peers of the chain that a session uses now."""
    return [hop.peer for hop in session.chain.hops]


def names_its_cause(error: Exception) -> bool:
    """P3: whether an error says which peer, which blocks or which limit it is about."""
    if isinstance(error, NoChain):
        return bool(error.missing)
    if isinstance(error, SlowPeer):
        return error.peer is not None or "deadline" in str(error)
    return isinstance(error, PeerFault | Refused) and error.peer is not None
