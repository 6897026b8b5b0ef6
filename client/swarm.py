"""A trio program's handle on a swarm: chains, sessions, tokens, hidden states and gradients."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import trio

from client.config import ClientConfig, check
from client.generation.options import GenerateArguments, GenerateOptions, options_of
from client.lengths import SessionLengths, check_room
from node.config import config_errors
from node.devices import best_dtype, find_device, use_device
from node.runtime import values
from routing.blocks import Blocks
from routing.chains.hops import Chain
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, Refused
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL
from tensor_codec.messages.info import INFO_PROTOCOL

if TYPE_CHECKING:
    from torch import Tensor

    from client.adapters.upload import AdapterUploads, AdapterUse, AnyAdapter
    from client.batch_parts import KeptInputs
    from client.bridges.sync import BlockingCalls
    from client.chains.avoided_peers import AvoidedPeers
    from client.chains.chain_choice import ChainChooser
    from client.chains.chooser import PeerStream
    from client.forward_backward import ForwardBackward, Gradients
    from client.generation.conversation import Conversation
    from client.generation.generate import Generation, Token
    from client.generation.generation_config import GenerationDefaults, Settings
    from client.generation.head_batches import HeadBatches
    from client.monitor.events import SwarmEvent
    from client.monitor.sessions import SessionStatus
    from client.monitor.watching import Watching
    from client.session.session import Session
    from client.session.trace import Trace
    from client.speculation.speculators import Speculators
    from node.model.checkpoint.info import ModelInfo
    from node.model.embed_and_head import EmbedAndHead
    from node.network.directory.directory import Directory
    from node.network.host import Host
    from node.runtime.compute_thread import Runner
    from routing.chains.alternatives import Constraints
    from routing.view.answers import Liveness
    from routing.view.view import SwarmView
    from tensor_codec.messages.info import PeerInfo

log = logging.getLogger("raceme")

FIND_SECONDS = 1.0  # for a look into the Kademlia table, where the neighbours know no chain


@dataclass(slots=True)
class Swarm:
    """A swarm that serves one model, seen from a client.  Made by `connect`."""

    config: ClientConfig
    info: ModelInfo
    local_model: EmbedAndHead
    routes: ChainChooser
    _host: Host
    _directory: Directory
    _compute: Runner
    _heads: HeadBatches
    _nursery: trio.Nursery
    generation_defaults: GenerationDefaults | None = None  # of the model's folder
    trio_token: trio.lowlevel.TrioToken | None = None  # of the run that it lives in
    _uploads: AdapterUploads = field(init=False)
    _lengths: SessionLengths = field(init=False)
    _stateless: ForwardBackward = field(init=False)
    _watching: Watching = field(init=False)
    speculators: Speculators = field(init=False)

    def __post_init__(self) -> None:
        from client.adapters.upload import AdapterUploads
        from client.chains.chain_choice import find_run
        from client.forward_backward import ForwardBackward
        from client.monitor.watching import Watching
        from client.speculation.speculators import Speculators

        config = self.config
        self.speculators = Speculators(
            lambda: self.local_model.tokenizer,
            self.info.vocab_size,
            self.info.name,
            self._compute,
            partial(_folder_of, config),
        )
        self._watching = Watching(self._directory, self._nursery, always=config.monitor)
        self._uploads = AdapterUploads(
            config.limits, self.info, partial(self.routes.open_stream, protocol=ADAPTER_PROTOCOL)
        )
        self._lengths = SessionLengths(
            self.info, config.limits, self.routes.constraints, lambda: self._directory.last_view
        )
        self._stateless = ForwardBackward(
            info=self.info,
            find_chain=partial(find_run, self.routes, config.wait_seconds),
            learn=self.routes.observe_prefill,
            dtype_of=partial(_dtype_of, self.routes),
            open_stream=partial(self.routes.open_stream, protocol=COMPUTE_PROTOCOL),
            compute=self._compute,
            blame=self.routes.blame,
            limits=config.limits,
            codec=config.codec,
            step_seconds=config.step_seconds,
            give_up_seconds=config.give_up_seconds,
        )

    @property
    def blame(self) -> AvoidedPeers:
        """The peers that are avoided now."""
        return self.routes.blame

    @property
    def ends(self) -> EmbedAndHead:
        """Another name of `local_model`."""
        return self.local_model

    @property
    def peer_id(self) -> PeerId:
        """The id by which the swarm's peers know this client."""
        return self._directory.peer_id

    def view(self) -> SwarmView:
        """The present view of the swarm."""
        return self._directory.view()

    @property
    def last_view(self) -> SwarmView:
        """The view of the last look; some of its records may have ended since.  For any thread."""
        return self._directory.last_view

    async def changed(self, since: SwarmView) -> None:
        """Return when the view differs from `since`.  Set your own deadline."""
        await self._directory.changed(since)

    async def rtts(self) -> dict[PeerId, float]:
        """The round trips to the peers that have answered within the last minute, in seconds."""
        await trio.lowlevel.checkpoint()
        return self._directory.rtts()

    async def answers(self, peer: str) -> bool:
        """Whether that peer answers a ping of this moment, within two seconds; False for an unknown peer."""
        return await self._directory.answers(PeerId(peer))

    async def liveness(self) -> dict[PeerId, Liveness]:
        """Whether each peer of the view answers, by the pings of the last seconds.

        A first question has this client ping more peers for a minute, every 1.1 to 1.7 s: those of its live
        sessions (64 at most), and the 64 with the rarest blocks.  Until a peer was asked it is "unknown".  A
        peer with two unanswered pings is "silent", and the view counts no block of it (`SwarmView.silent`).
        """
        await trio.lowlevel.checkpoint()
        return self._watching.liveness()

    async def sessions(self) -> list[SessionStatus]:
        """The live sessions of this client, the oldest first: hops, times, rates."""
        await trio.lowlevel.checkpoint()
        return self._watching.sessions()

    def events(self) -> AsyncGenerator[SwarmEvent, None]:
        """The events from now on: of peers (joined, left, moved, silent, back), and of our own sessions.

        A fault is told at its moment, before the next token.  Servers are pinged as by `liveness` while
        somebody listens.  A listener that is 1,024 events behind loses the oldest, and reads how many in
        `lost`.  At most 32 listen at a time, a further one gets RuntimeError.  Leave the loop early under
        `contextlib.aclosing`.
        """
        return self._watching.events()

    async def route(self) -> Chain:
        """The chain that a session would take now.  Raises NoChain."""
        return await self.routes.choose_measured(self.routes.choose)

    async def chains(self, max_chains: int) -> list[Chain]:
        """Up to `max_chains` chains over the whole model, the best first.

        They share as few servers as they can, and none where other servers hold their blocks: the later
        chains are the swarm without the servers of the first.  Raises NoChain, and ValueError for a
        number below 1.
        """
        max_chains = values.whole("max_chains", max_chains)
        await self.routes.choose_measured(self.routes.choose)
        return self.routes.chains(max_chains)

    def generate(
        self,
        prompt: Any,  # Any: text, or token ids in any container
        options: GenerateOptions | None = None,
        *,
        conversation: Conversation | None = None,
        adapter: AnyAdapter | None = None,
        trace: Trace | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> AsyncGenerator[Token, None]:
        """Continue `prompt`; yields each token with its text as it comes.

        prompt: text, or token ids as a list, an array or a tensor, [n] or [1, n].
        options, arguments: see `client.GenerateOptions`; a keyword replaces a field of `options`.
        Ends at an end token of the model, at a stop string, at a token of `stop_token_ids`, or after
        `max_new_tokens`; the last token says which in `finish_reason`.
        conversation: from `conversation`: keep the caches for the next call; it has its own adapter.
        adapter: an adapter that this program brings to the servers, or the name of one that servers keep.
        trace: records the events of the session; a conversation has its own.

        A server that fails is replaced, and the server before it sends its inputs to the new one: the
        caller sees a pause.  Raises on the call ValueError (an option, a token or a length out of
        range) and TypeError (an unknown option); later NoChain, PeerFault, Refused, and ValueError where
        the options forbid every token.
        Leave the loop early under `contextlib.aclosing`, so that the session ends at once.
        """
        from client.generation.generate import Generation

        ids, settings = self._settle(prompt, options_of(options, arguments), conversation)
        length = len(ids) + settings.max_new_tokens
        what = f"a prompt of {len(ids)} tokens and {settings.max_new_tokens} new ones"
        if conversation is None:
            self._lengths.check(length, what)
        elif adapter is not None:
            raise ValueError("a conversation has its own adapter: give it to `conversation`")
        else:
            check_room(length, what, conversation.max_length)
        given = conversation or self.conversation(length, adapter=adapter, trace=trace)
        ends = cast("EmbedAndHead", given.local_model)  # of this swarm, with the adapter of the conversation
        speculation = self.speculators.speculation(settings.speculate)
        generation: Generation = Generation(ends, given, settings, speculation=speculation)
        return generation.run(ids, close=conversation is None)

    def settings(
        self,
        prompt: Any,  # Any: text, or token ids in any container
        options: GenerateOptions | None = None,
        *,
        conversation: Conversation | None = None,
        **arguments: Unpack[GenerateArguments],
    ) -> Settings:
        """The settings of a `generate` with these arguments, and the names of settings from the model's file.

        Raises the errors of `generate` on the call.
        """
        return self._settle(prompt, options_of(options, arguments), conversation)[1]

    def _settle(
        self,
        prompt: Any,  # Any: a caller's value
        options: GenerateOptions,
        conversation: Conversation | None,
    ) -> tuple[list[int], Settings]:
        """The prompt's tokens, and the settings for them."""
        from client.generation.checks import prompt_ids
        from client.generation.generation_config import GenerationDefaults, settle

        ids = prompt_ids(prompt, self.local_model.tokenizer, self.info.vocab_size)
        longest = self._lengths.longest(1) if conversation is None else conversation.max_length
        settings = settle(
            options,
            self.generation_defaults or GenerationDefaults(),
            tokenizer=self.local_model.tokenizer,
            vocabulary=self.info.vocab_size,
            prompt_tokens=len(ids),
            room=longest - len(ids),
        )
        return ids, settings

    def conversation(
        self,
        max_length: int | None = None,
        *,
        adapter: AnyAdapter | None = None,
        trace: Trace | None = None,
        constraints: Constraints | None = None,
    ) -> Conversation:
        """A session whose caches outlive one `generate`: later prompts send their new tokens alone.

        Give it to `generate(conversation=...)` and `close` it at the end.  max_length: in tokens; None: see
        `usual_length`.  adapter: see `generate`; as it is now, whatever is trained later: the caches depend
        on it.  trace: records the events; `conversation.trace` if not given.
        constraints: in place of those of `connect`.
        Raises ValueError for a length that the model or the servers do not allow.
        """
        from client.adapters.adapter import Adapter
        from client.adapters.ends import ends_with
        from client.generation.conversation import Conversation
        from client.generation.head_batches import HeadBatches
        from client.session.trace import Trace

        use = self._uploads.use_of(adapter, self.last_view)
        first = 0 if use is None else use.virtual_tokens
        if max_length is None:
            max_length = max(1, self.usual_length() - first)
        max_length = values.whole("max_length", max_length)
        self._lengths.check(max_length, f"a conversation of {max_length} tokens", virtual_tokens=first)
        ends, heads = self.local_model, self._heads
        if isinstance(adapter, Adapter) and adapter.tensors.is_at_ends:
            ends = ends_with(ends, adapter)
            heads = HeadBatches(ends, self._compute)
        return Conversation(
            local_model=ends,
            compute=self._compute,
            heads=heads,
            open_chain=partial(self.open_chain, adapter=use, constraints=constraints),
            worked=lambda session: self.routes.worked(session.working_hops),
            max_length=max_length,
            give_up_seconds=self.config.give_up_seconds,
            first_position=first,
            trace=Trace() if trace is None else trace,
        )

    @asynccontextmanager
    async def session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> AsyncIterator[Session]:
        """A session for hidden states: `await session.step(hidden)`.

        batch: rows.  max_length: positions of each row; None: see `usual_length`.
        start, stop: the blocks [start, stop) that it goes through, by default all.
        prompts: deep prompts [stop - start, n, hidden], see `forward`: for positions below n of every row.
        adapter: see `generate`; the session keeps it as it is now.  After a prefix the first position of the
        model is `virtual_tokens` of its manifest: where embeddings are learned they begin there.
        A hop that fails is replaced; `step` raises when its deadline (`give_up_seconds`) has passed, and
        the session may be used again then.  `session.trace` has the events.
        Raises ValueError (a length that the model or the servers do not allow, blocks that the model does
        not have, prompts of another shape), NoChain, PeerFault, Refused.
        """
        session = await self.open_session(
            batch=batch, max_length=max_length, start=start, stop=stop, prompts=prompts, adapter=adapter
        )
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(2):
                await session.aclose()

    async def open_session(
        self,
        *,
        batch: int = 1,
        max_length: int | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Session:
        """A session as `session` gives it, for programs that cannot use `with`.

        It is open until its `close`, which returns at once, or until the swarm is left.  Raises as `session`.
        """
        run = _blocks(self.info, start, stop)
        batch = values.whole("batch", batch)
        if max_length is not None:
            max_length = values.whole("max_length", max_length)
        use = self._uploads.use_of(adapter, self.last_view)
        first = 0 if use is None else use.virtual_tokens
        max_length = max_length or max(1, self._lengths.usual(batch, run) - first)
        position = 4 * batch * self.info.hidden_size
        if not self.config.limits.step_tokens(position):
            raise ValueError(
                f"one position of {batch} rows takes {position} bytes, max_frame_bytes is"
                f" {self.config.limits.max_frame_bytes}"
            )
        rows = f"{batch} rows of " if batch > 1 else ""
        what = f"a session of {rows}{max_length} positions"
        self._lengths.check(max_length, what, batch, run, virtual_tokens=first)
        return await self.open_chain(
            max_length=max_length, batch=batch, start=run.start, stop=run.stop, prompts=prompts, adapter=use
        )

    async def forward(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor:
        """The output of blocks [start, stop), by default all, for hidden states [batch, tokens, hidden].

        Without a session or a cache: positions count from 0 in every row.  hidden: any float dtype.
        Returns that shape on the CPU, before the final norm: in bfloat16 where the last hop computes in
        bfloat16, else in float32.
        prompts: deep prompts [stop - start, n, hidden]: every block adds its own to the first n positions of
        its input, in all rows.  Only servers whose records say that they take prompts are asked then.
        adapter: see `generate`; for a prefix see `session`.
        A large batch is cut by rows into requests, several of them under way at a time.  A server
        that fails is replaced, and its part alone is done again.
        Raises ValueError (a shape, a dtype or a value that cannot be, a row too long for one request),
        NoChain, PeerFault, Refused.
        """
        use = self._uploads.use_of(adapter, self.last_view)
        return await self._stateless.forward(hidden, *_blocks(self.info, start, stop), prompts, use)

    async def forward_kept(
        self,
        hidden: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> tuple[Tensor, KeptInputs]:
        """`forward`, and the input of every server: `backward` of it asks for no forward again.

        The kept inputs take the hidden states of the batch, once for each server of a chain, of this
        program's memory (`nbytes`), until `release` or until the program drops them.  They serve any number
        of backwards.  Rows are cut as for a backward: a row of which two do not fit into a frame is refused.
        """
        use = self._uploads.use_of(adapter, self.last_view)
        return await self._stateless.forward_kept(hidden, *_blocks(self.info, start, stop), prompts, use)

    async def backward(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The gradient of a loss with respect to `hidden`, the input of block `start`.

        grad: its gradient with respect to the output of block `stop` - 1, in the shape of `hidden`.
        prompts: as in `forward`; the answer is then a pair, the second item the gradient of the prompts: in
        their shape, float32, the sum over all rows.
        hidden: of hidden states, every server but the last runs its blocks forward once more before the
        gradient comes back to it.  The kept inputs of a `forward_kept` save that, and the result is equal;
        blocks, prompts and adapter are those of that call.  A server that has gone since is replaced for its
        own blocks.
        adapter: as in `forward`; `gradients` gives those of its values too.
        The weights are frozen.  Everything else is as in `forward`; the result is the gradient of an
        undisturbed pass, or an error, never a part of it.
        """
        found = await self.gradients(hidden, grad, start=start, stop=stop, prompts=prompts, adapter=adapter)
        return found.hidden if found.prompts is None else (found.hidden, found.prompts)

    async def gradients(
        self,
        hidden: Tensor | KeptInputs,
        grad: Tensor,
        *,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AnyAdapter | None = None,
    ) -> Gradients:
        """`backward`, with all gradients: of the hidden states, of the prompts, and of the adapter.

        Those of an adapter that this program brings are a mapping from each block with sites to the gradient
        of its blob's values: float32, flat, in the blob's order, the sum over all rows.  Servers add them up
        over the requests of the call.  They have the same bits whatever servers fail on the way.
        """
        from client.batch_parts import KeptInputs

        run = _blocks(self.info, start, stop)
        if not isinstance(hidden, KeptInputs):
            use = self._uploads.use_of(adapter, self.last_view)
            return await self._stateless.backward(hidden, grad, *run, prompts, use)
        others = prompts is not None or adapter is not None
        if others or ((start, stop) != (0, None) and run != (hidden.start, hidden.stop)):
            own = f"{hidden.start}:{hidden.stop}"
            raise ValueError(
                f"kept inputs have their own prompts, adapter and blocks, {own}: give none of them"
            )
        return await self._stateless.backward_kept(hidden, grad)

    async def peer_info(self, peer: str) -> PeerInfo:
        """The state of a server at this moment, by its own word: free cache, sessions, rates, queue.

        peer: its id.  The records of `view` say the same of all servers, some seconds old.
        Raises PeerGone (unknown to the view, or not to be reached), SlowPeer after `step_seconds`,
        RemoteProtocolError (a version that does not know the question, or no server), and Refused while
        the peer loads blocks.
        """
        from node.network.peer_info import ask_for_info

        if self.view().get(PeerId(peer)) is None:
            raise PeerGone(f"{values.shown(peer)} is not in our view of the swarm")
        try:
            stream = await self.routes.open_stream(PeerId(peer), INFO_PROTOCOL)
            return await ask_for_info(stream, self.config.step_seconds)
        except (PeerFault, Refused) as error:
            error.about(PeerId(peer))
            raise

    async def open_chain(
        self,
        *,
        max_length: int,
        batch: int = 1,
        start: int = 0,
        stop: int | None = None,
        prompts: Tensor | None = None,
        adapter: AdapterUse | None = None,
        constraints: Constraints | None = None,
        deadline: float | None = None,
        trace: Trace | None = None,
    ) -> Session:
        """Open a session along the best chain, waiting up to `wait_seconds` for one to come up.

        start, stop, prompts: as in `session`.  adapter: of all hops.  constraints: in place of this client's.
        deadline: on trio's clock, in place of `wait_seconds`.
        Peers that have failed lately are used only when nothing else covers these blocks.
        Raises ValueError for blocks that the model does not have and for prompts of another shape; NoChain,
        PeerFault and Refused when the time is up.
        """
        from client.adapters.upload import Needs
        from client.batch_parts import BatchCutter
        from client.chains.chain_choice import chooser_for
        from client.session.session import open_session
        from client.session.terms import Terms
        from client.session.trace import Trace

        wait_until = trio.current_time() + self.config.wait_seconds
        info = self.info
        terms = Terms(
            info.name, info.revision, _blocks(info, start, stop), info.hidden_size, batch, max_length,
            self.config.codec, self.local_model.rope, standby=self.config.standby,
        )  # fmt: skip
        routes = self.routes if constraints is None else replace(self.routes, constraints=constraints)
        if prompts is not None:
            cutter = BatchCutter(info, self.config.limits, self.config.codec)
            terms = replace(terms, prompts=await self._compute.run(cutter.for_session, prompts, terms))
        if prompts is not None or adapter is not None:
            terms, routes = (
                replace(terms, adapter=adapter),
                chooser_for(routes, Needs(prompts is not None, adapter)),
            )
        trace = Trace() if trace is None else trace
        name = self._watching.traced(trace)
        session = await open_session(
            terms,
            routes,
            nursery=self._nursery,
            compute=self._compute,
            limits=self.config.limits,
            give_up_seconds=self.config.give_up_seconds,
            deadline=wait_until if deadline is None else min(deadline, wait_until),
            trace=trace,
        )
        self._watching.opened(name, session)
        return session

    def blocking_calls(self) -> BlockingCalls:
        """Blocking calls into this swarm's event loop, for the program's other threads."""
        from client.bridges.sync import BlockingCalls, SwarmSide

        assert self.trio_token is not None
        return BlockingCalls(SwarmSide(self.trio_token, self._nursery))

    def usual_length(self, batch: int = 1) -> int:
        """Positions of a session of `batch` rows without a length of its own.

        The model's number, up to a quarter of a server's cache: a session of this length does not wait
        for others (`node.serving.cache_budget`).
        """
        return self._lengths.usual(values.whole("batch", batch))


async def _dial_hop(
    host: Host, directory: Directory, seconds: float, peer: PeerId, addresses: Sequence[str], protocol: str
) -> PeerStream:
    """A stream to a hop, whose connection stays open for the next session.  Raises PeerFault."""
    stream = await host.open_stream(peer, addresses, protocol, seconds=seconds)
    directory.pings.use(peer)
    return stream


@asynccontextmanager
async def open_swarm(config: ClientConfig) -> AsyncIterator[Swarm]:
    """The trio side of `connect`.  Raises ConfigError."""
    from client.chains.chain_choice import ChainChooser
    from client.chains.chain_wait import ViewChanges
    from client.chains.considered import Considered
    from client.generation.head_batches import HeadBatches
    from node.network.directory.directory import DirectoryConfig, open_directory
    from node.network.host import open_host
    from node.network.joining import use_ways_of_others
    from node.network.relaying.service import open_relaying
    from node.network.transport.identity import load_or_create_identity
    from node.network.transport.membership import load_swarm_key, swarm_id
    from node.runtime.compute_thread import open_compute_thread
    from node.runtime.nurseries import background_nursery

    check(config)
    key = load_swarm_key(config.swarm_key) if isinstance(config.swarm_key, Path) else config.swarm_key
    identity = load_or_create_identity(config.identity)
    async with (
        open_compute_thread() as compute,
        open_host(identity=identity, listen=(), swarm_key=key, limits=config.limits) as host,
        open_relaying(host) as relaying,
        open_directory(
            host,
            identity,
            DirectoryConfig(swarm=swarm_id(key), bootstrap=config.peers, role="client", limits=config.limits),
        ) as directory,
        background_nursery() as nursery,
    ):
        # At once: the first ping finds a relayed server through its relays.
        use_ways_of_others(host, directory, relaying, nursery, config.limits)
        info, local_model, defaults = await compute.run(_load_model, config)
        gc.freeze()  # these objects stay: later collections need not visit a million of them
        heads = HeadBatches(local_model, compute)
        # Not to be abandoned: a thread that compiles while the interpreter ends takes the process with it.
        nursery.start_soon(trio.to_thread.run_sync, local_model.make_exact_argmax)
        routes = ChainChooser(
            info.name,
            info.revision,
            info.blocks,
            view=directory.view,
            rtts=directory.rtts,
            dial=partial(_dial_hop, host, directory, config.limits.dial_seconds),
            changes=ViewChanges(
                directory.changed, partial(directory.find_peers, info.revision, FIND_SECONDS)
            ),
            pings=directory,
            late=directory.late,
            constraints=replace(config.constraints, step_tokens=_step_tokens(config, info)),
            spread=identity.peer_id,
            few=Considered(position_bytes=2 * info.hidden_size),
        )
        token = trio.lowlevel.current_trio_token()
        yield Swarm(
            config, info, local_model, routes, host, directory, compute, heads, nursery, defaults, token
        )


def _blocks(info: ModelInfo, start: int, stop: int | None) -> Blocks:
    """A run of the model's blocks; stop: None is the last.  Raises ValueError for any other run."""
    start = values.whole("start", start, 0)
    stop = info.blocks if stop is None else values.whole("stop", stop, 0)
    if not start < stop <= info.blocks:
        raise ValueError(f"blocks {start}:{stop} of a model that has 0:{info.blocks}")
    return Blocks(start, stop)


def _dtype_of(routes: ChainChooser, peer: PeerId) -> str | None:
    """The dtype that a peer announces, or None where the peer has left."""
    record = routes.view().get(peer)
    return None if record is None else record.dtype


def _step_tokens(config: ClientConfig, info: ModelInfo) -> int:
    """Tokens that servers must take in one step; 0 where this client keeps to the usual bound."""
    own, usual = (limits.step_tokens(4 * info.hidden_size) for limits in (config.limits, Limits()))
    return max(config.constraints.step_tokens, own if own > usual else 0)


def _folder_of(config: ClientConfig, named: str) -> Path:
    """Runs in a thread: the folder of another model, fetched where it is not there.  Raises ConfigError."""
    from node.model.checkpoint.progress import progress_bar
    from node.model.checkpoint.source import cache_dir, resolve

    with progress_bar(sys.stderr) as progress:
        folder = resolve(
            named,
            cache_dir=config.cache_dir or cache_dir(),
            progress=progress,
            max_disk_bytes=config.max_disk_bytes,
        )
        folder.need({entry.file for entry in folder.tensors.values()})
    return folder.path


def _load_model(config: ClientConfig) -> tuple[ModelInfo, EmbedAndHead, GenerationDefaults]:
    """Runs in the torch thread: find the model's folder and load its embeddings, norm and head.

    Raises ConfigError.
    """
    from node.imports import uncollected_imports

    with uncollected_imports():
        import torch

        from client.generation.generation_config import FILE, read_defaults
        from node.model.blocks.span import DTYPES
        from node.model.checkpoint.info import read_info
        from node.model.checkpoint.progress import progress_bar
        from node.model.checkpoint.source import cache_dir, resolve
        from node.model.embed_and_head import load_embed_and_head

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with config_errors():
        device = find_device(config.ends.device)
    use_device(device)
    dtype = config.ends.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else best_dtype(device)
    with progress_bar(sys.stderr) as progress:
        folder = resolve(
            config.model,
            cache_dir=config.cache_dir or cache_dir(),
            progress=progress,
            max_disk_bytes=config.max_disk_bytes,
        )
        local_model = load_embed_and_head(folder, dtype=DTYPES[dtype], device=device, progress=progress)
        local_model.compile_head()
    with uncollected_imports():
        _ = local_model.tokenizer  # opened here, so that the event loop never waits for it
    info = read_info(folder)
    defaults = read_defaults(folder.path, info.vocab_size)
    if defaults.unsupported:
        log.warning("%s: not used here: %s", folder.path / FILE, ", ".join(defaults.unsupported))
    return info, local_model, defaults
