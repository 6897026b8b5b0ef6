"""Read this first: from `connect` to tokens.

    async with client.connect(peers=["/ip4/.../tcp/.../p2p/..."]) as swarm:
        async for token in swarm.generate("The capital of France is"):
            print(token.text, end="", flush=True)

`connect` joins the swarm as a node that serves nothing, loads the model's embeddings, norm and
head, and gives a `Swarm`.  Under trio everything runs in the caller's own event loop; under asyncio
(any loop) `client.bridge` runs the same code in a trio thread.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sniffio
import trio

from node.config import ConfigError
from routing.chain import Chain, NoChain, cheapest_chain
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits
from tensor_codec.messages import COMPUTE_PROTOCOL, SESSION_PROTOCOL

if TYPE_CHECKING:
    from torch import Tensor

    from client.api import SwarmLike
    from client.generate import Generation, Token
    from client.heads import Heads
    from client.retry import Blame, Context
    from client.session import Session
    from client.stateless import Stateless
    from node.compute import ComputeThread
    from node.model.ends import Ends
    from node.model.info import ModelInfo
    from node.network.directory import Directory
    from node.network.host import Host
    from node.network.streams import FramedStream
    from routing.swarm import SwarmView

PINGED_PEERS = 16  # candidates whose round trip is measured before a chain is chosen
PING_SECONDS = 1.0
FIND_SECONDS = 1.0  # for a look into the Kademlia table, where the neighbours know no chain
RATE_WEIGHT = 0.2  # of the newest step in what we believe of a hop's speed
RETRY_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a client joins and how long it waits.

    model: a folder, a hub id, or a built-in name; None for the default.
    peers: multiaddrs with /p2p/ID of nodes of the swarm.
    wait_seconds: for a chain to come up.  step_seconds: for one step, or one request of `forward`
    and `backward` at one hop.  give_up_seconds: for one token, or one hop's part of such a request,
    with new chains and replays.
    codec: how hidden states travel: "auto" (nothing is lost), "fp32" or "bf16".
    """

    peers: tuple[str, ...]
    model: str | None = None
    swarm_key: Path | bytes | None = None
    identity: Path | None = None
    cache_dir: Path | None = None
    threads: int | None = None
    wait_seconds: float = 30.0
    step_seconds: float = 30.0
    give_up_seconds: float = 120.0
    codec: str = "auto"
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class Swarm:
    """A swarm that serves one model, seen from a client.  Made by `connect`."""

    config: ClientConfig
    info: ModelInfo
    ends: Ends
    blame: Blame
    _host: Host
    _directory: Directory
    _compute: ComputeThread
    _heads: Heads
    _nursery: trio.Nursery
    _rates: dict[PeerId, float] = field(default_factory=dict)  # seconds per block, as seen here
    _stateless: Stateless = field(init=False)

    def __post_init__(self) -> None:
        from client.stateless import Stateless

        config = self.config
        self._stateless = Stateless(
            info=self.info,
            find_chain=self._find_run,
            dtype_of=self._dtype_of,
            open_stream=partial(self._open_stream, protocol=COMPUTE_PROTOCOL),
            compute=self._compute,
            blame=self.blame,
            limits=config.limits,
            codec=config.codec,
            step_seconds=config.step_seconds,
            give_up_seconds=config.give_up_seconds,
        )

    def view(self) -> SwarmView:
        """What is known of the swarm now."""
        return self._directory.view()

    async def changed(self, since: SwarmView) -> None:
        """Return when the view is another than `since`.  Set your own deadline."""
        await self._directory.changed(since)

    async def route(self) -> Chain:
        """The chain that a session would take now.  Raises NoChain."""
        return await self._route(self._choose)

    async def _route(self, choose: Callable[[frozenset[PeerId]], Chain]) -> Chain:
        """What `choose` makes of the peers to be avoided, once the round trips are known."""
        spans = self.view().spans(self.info.revision, self.info.blocks)
        await self._directory.measure([span.peer for span in spans[:PINGED_PEERS]], PING_SECONDS)
        return choose(self.blame.avoided(trio.current_time()))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        context: Context | None = None,
    ) -> AsyncGenerator[Token, None]:
        """Continue `prompt` (text, or token ids); yields each token with its text as it comes.

        Greedy unless `temperature` is above 0.  Ends at the model's end token, at a stop string,
        or after `max_new_tokens`; the last token says which in `finish_reason`.
        context: from `conversation`: keep the caches for the next call.
        A server that fails is replaced and the tokens so far are sent again: the caller sees a
        pause.  Raises ValueError (an option or a length out of range), NoChain, PeerFault, Refused.
        Leave the loop early under `contextlib.aclosing`, so that the session ends at once.
        """
        from client.generate import Generation
        from client.sampling import SamplingOptions

        options = SamplingOptions(temperature, top_k, top_p, repetition_penalty, seed)
        ids = self._token_ids(prompt)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        length = len(ids) + max_new_tokens
        if "" in stops:
            raise ValueError("a stop string is empty: it would end every text before its first token")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, at least 1 is needed")
        self._check_length(length, f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones")
        own = context is None
        generation: Generation = Generation(
            ends=self.ends,
            context=context or self.conversation(length),
            options=options,
            stop=stops,
            max_new_tokens=max_new_tokens,
        )
        return generation.run(ids, close=own)

    def conversation(self, max_length: int = 2048) -> Context:
        """A session whose caches outlive one `generate`: later prompts only send what is new.

        Give it to `generate(context=...)` and `close` it at the end.  max_length: in tokens.
        """
        from client.retry import Context

        self._check_length(max_length, f"a conversation of {max_length} tokens")
        return Context(
            ends=self.ends,
            compute=self._compute,
            heads=self._heads,
            open_chain=self.open_chain,
            blame=self.blame,
            worked=self._learn,
            max_length=max_length,
            give_up_seconds=self.config.give_up_seconds,
        )

    @asynccontextmanager
    async def session(self, *, batch: int = 1, max_length: int = 2048) -> AsyncIterator[Session]:
        """A session for hidden states: `await session.step(hidden)`.

        It is not repaired when a hop fails: `step` then raises PeerFault or Refused.
        Raises NoChain, PeerFault, Refused.
        """
        self._check_length(max_length, f"a session of {max_length} positions")
        session = await self.open_chain(max_length=max_length, batch=batch)
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await session.aclose()

    async def forward(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """What blocks [start, stop), by default all, make of hidden states [batch, tokens, hidden].

        Without a session or a cache: positions count from 0 in every row.  hidden: any float dtype.
        Returns the same shape on the CPU, before the final norm: in bfloat16 where that is what the
        last hop computes in, else in float32.
        A large batch is cut by rows into requests, several of them on their way at a time.  A server
        that fails is replaced, and only its part is done again.
        Raises ValueError (a shape, a dtype or a value that cannot be, a row too long for one request),
        NoChain, PeerFault, Refused.
        """
        return await self._stateless.forward(hidden, start, self.info.blocks if stop is None else stop)

    async def backward(
        self, hidden: Tensor, grad: Tensor, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The gradient of a loss with respect to `hidden`, the input of block `start`.

        grad: its gradient with respect to the output of block `stop` - 1, in the shape of `hidden`.
        The weights are frozen.  Every server runs its blocks forward once more, so nothing of an earlier
        `forward` is needed.  Everything else is as in `forward`; what comes out is the gradient that
        an undisturbed pass would have given, or an error, never a part of it.
        """
        stop = self.info.blocks if stop is None else stop
        return await self._stateless.backward(hidden, grad, start, stop)

    async def open_chain(self, *, max_length: int, batch: int = 1) -> Session:
        """Open a session along the best chain, waiting up to `wait_seconds` for one to come up.

        Peers that have failed lately are used only when nothing else covers the model.
        Raises NoChain, or PeerFault and Refused with `peer` from opening.
        """
        return await self._open(await self._wait_for_chain(self._choose), max_length, batch)

    async def _find_run(
        self,
        start: int,
        stop: int,
        *,
        positions: int,
        measured: Mapping[PeerId, float],
        waiting: Mapping[PeerId, int],
    ) -> Chain:
        """The chain over these blocks with the most throughput, as `open_chain` waits for one."""
        choose = partial(
            self._choose, start=start, stop=stop, positions=positions, measured=measured, waiting=waiting
        )
        return await self._wait_for_chain(choose)

    async def _wait_for_chain(self, choose: Callable[[frozenset[PeerId]], Chain]) -> Chain:
        deadline = trio.current_time() + self.config.wait_seconds
        chain, looked_further = None, False
        while chain is None:
            seen = self.view()
            try:
                chain = await self._route(choose)
            except NoChain:
                if trio.current_time() >= deadline:
                    raise
                if not looked_further:  # beyond what the neighbours know
                    looked_further = True
                    await self._directory.find_peers(self.info.revision, FIND_SECONDS)
                with trio.move_on_at(min(deadline, trio.current_time() + RETRY_PAUSE_SECONDS)) as pause:
                    await self._directory.changed(seen)
                if pause.cancelled_caught:
                    with suppress(NoChain):
                        chain = choose(frozenset())
        return chain

    async def _open(self, chain: Chain, max_length: int, batch: int) -> Session:
        from client.session import Terms, open_session
        from tensor_codec.compression import codec_for

        view, info = self.view(), self.info
        records = {hop.peer: view.get(hop.peer) for hop in chain.hops}
        dtypes = {peer: record.dtype for peer, record in records.items() if record is not None}
        gone = next((peer for peer, record in records.items() if record is None), None)
        if gone is not None:
            fault = PeerGone(f"{gone} has just left the swarm")
            fault.peer = gone
            raise fault
        codec = codec_for(frozenset(dtypes.values())) if self.config.codec == "auto" else self.config.codec
        terms = Terms(info.name, info.revision, info.hidden_size, batch, max_length, dtypes, codec)
        return await open_session(
            chain,
            terms,
            open_stream=partial(self._open_stream, protocol=SESSION_PROTOCOL),
            nursery=self._nursery,
            compute=self._compute,
            limits=self.config.limits,
            step_seconds=self.config.step_seconds,
        )

    def _dtype_of(self, peer: PeerId) -> str | None:
        record = self.view().get(peer)
        return record.dtype if record is not None else None

    async def _open_stream(self, peer: PeerId, protocol: str) -> FramedStream:
        record = self.view().get(peer)
        addresses = record.addresses if record is not None else ()
        seconds = self.config.limits.dial_seconds
        return await self._host.open_stream(peer, addresses, protocol, seconds=seconds)

    def _choose(
        self,
        excluded: frozenset[PeerId],
        *,
        start: int = 0,
        stop: int | None = None,
        positions: int = 1,
        measured: Mapping[PeerId, float] | None = None,
        waiting: Mapping[PeerId, int] | None = None,
    ) -> Chain:
        """The chain to use, as `cheapest_chain` says.  measured: None for that of decode steps."""
        info, view = self.info, self.view()
        try:
            return cheapest_chain(
                view.spans(info.revision, info.blocks),
                info.blocks,
                start=start,
                stop=stop,
                client_rtt=self._directory.rtts(),
                measured=self._rates if measured is None else measured,
                excluded=excluded,
                positions=positions,
                waiting=waiting,
            )
        except NoChain as none:
            served = view.models()
            if not served or info.revision in {key.revision for key in served}:
                raise
            ours = f"not {info.name} (revision {info.revision})"
            instead = [f"{key.model} (revision {key.revision})" for key in served]
            raise NoChain(none.missing, none.blocks, alone=True, instead=[*instead, ours]) from None

    def _learn(self, session: Session) -> None:
        """Take in what a step has shown about its hops."""
        for hop in session.chain.hops:
            self.blame.worked(hop.peer)
        if session.times is None or session.last_tokens != 1:
            return
        for hop, (held, _) in zip(session.chain.hops, session.times.hops, strict=False):
            rate = held / (hop.stop - hop.start)
            known = self._rates.get(hop.peer, rate)
            self._rates[hop.peer] = known + RATE_WEIGHT * (rate - known)

    def _token_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self.ends.tokenizer(prompt)["input_ids"])
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens")
        vocabulary = self.info.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            raise ValueError(f"token {wrong[0]} is not one of the model's {vocabulary}")
        return ids

    def _check_length(self, length: int, what: str) -> None:
        allowed = min(self.info.max_position, self.config.limits.max_session_tokens)
        if not 0 < length <= allowed:
            raise ValueError(f"{what} make {length} positions, 1 to {allowed} are allowed")


def connect(
    model: str | None = None,
    *,
    peers: Sequence[str],
    swarm_key: Path | str | bytes | None = None,
    identity: Path | str | None = None,
    cache_dir: Path | str | None = None,
    threads: int | None = None,
    wait_seconds: float = 30.0,
    step_seconds: float = 30.0,
    give_up_seconds: float = 120.0,
    codec: str = "auto",
) -> AbstractAsyncContextManager[SwarmLike]:
    """Join a swarm as a client: `async with connect(...) as swarm`.

    model: a folder, a hub id, or a built-in name; None for the default model.
    peers: multiaddrs (with /p2p/ID) of one or more nodes of the swarm, bootstrap nodes or others.
    swarm_key: a key file, or the key's 32 bytes, where the swarm is private.
    threads: of torch in this process; None leaves them as they are.
    wait_seconds, step_seconds, give_up_seconds: see `ClientConfig`.
    Works under trio, and under asyncio (any event loop) through a trio thread of its own; the
    handle has the same methods.  Raises ConfigError on entry: no such model, a bad address, no peer
    could be reached, the swarm does not accept the key.
    """
    config = ClientConfig(
        peers=tuple(peers),
        model=model,
        swarm_key=Path(swarm_key) if isinstance(swarm_key, str) else swarm_key,
        identity=Path(identity) if identity is not None else None,
        cache_dir=Path(cache_dir) if cache_dir is not None else None,
        threads=threads,
        wait_seconds=wait_seconds,
        step_seconds=step_seconds,
        give_up_seconds=give_up_seconds,
        codec=codec,
    )
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
            from client.bridge import open_bridge

            self._inner = open_bridge(self._config)
        return await self._inner.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> bool | None:  # Any: passed on as it comes
        inner, self._inner = self._inner, None
        return await inner.__aexit__(*exc_info) if inner is not None else None


@asynccontextmanager
async def open_swarm(config: ClientConfig) -> AsyncIterator[Swarm]:
    """The trio side of `connect`.  Raises ConfigError."""
    from client.heads import Heads
    from client.retry import Blame
    from node.compute import open_compute_thread
    from node.network.directory import open_directory
    from node.network.host import open_host
    from node.network.identity import load_or_create_identity
    from node.network.membership import load_swarm_key, swarm_id
    from node.tasks import background_nursery

    if not config.peers:
        raise ConfigError("a client needs the address of at least one node of the swarm (--peers)")
    if config.codec not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"the codec is {config.codec!r}, auto, fp32 or bf16 is allowed")
    key = load_swarm_key(config.swarm_key) if isinstance(config.swarm_key, Path) else config.swarm_key
    identity = load_or_create_identity(config.identity)
    async with (
        open_compute_thread() as compute,
        open_host(identity=identity, listen=(), swarm_key=key, limits=config.limits) as host,
        open_directory(
            host,
            identity,
            swarm=swarm_id(key),
            bootstrap=config.peers,
            role="client",
            limits=config.limits,
        ) as directory,
        background_nursery() as nursery,
    ):
        info, ends = await compute.run(_load_ends, config)
        gc.freeze()  # what is there now stays: later collections need not look at a million objects
        heads = Heads(ends, compute)
        # Not to be abandoned: a thread that compiles while the interpreter ends takes the process with it.
        nursery.start_soon(trio.to_thread.run_sync, ends.make_screen)
        yield Swarm(config, info, ends, Blame(), host, directory, compute, heads, nursery)


def _load_ends(config: ClientConfig) -> tuple[ModelInfo, Ends]:
    """Runs in the torch thread: find the model's folder and load its embeddings, norm and head."""
    import torch

    from node.model.ends import load_ends
    from node.model.info import read_info
    from node.model.progress import progress_bar
    from node.model.source import cache_dir, resolve

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with progress_bar(sys.stderr) as progress:
        folder = resolve(config.model, cache_dir=config.cache_dir or cache_dir(), progress=progress)
        ends = load_ends(folder, progress=progress)
        ends.compile_head()
    _ = ends.tokenizer  # opened here, so that the event loop never waits for it
    return read_info(folder), ends
