"""Read this first: the parts of a node, in the order of its start and its end.

    config -> host (libp2p) -> directory (Kademlia, records) -> model folder -> blocks to serve
           -> span in memory -> engine -> listeners -> online ... draining -> gone
                                  ^                                |
                                  +--- other blocks (balancer) <---+

One token passes `serving/served_span.py` (StreamDispatch), `sessions/listener.py`, `sessions/worker.py` and
`sessions/state.py` there, `executor/engine.py`, `model/blocks/span.py` and `sessions/push.py`;
docs/path-of-a-token.md follows it.  This module only assembles parts: pure functions elsewhere decide.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from node.config import LLM_INT8, VERSION, ConfigError, NetworkConfig, NodeConfig, config_errors
from node.devices import (
    best_dtype,
    find_devices,
    hardware,
    is_out_of_memory,
    kind_of,
    set_up_allocator,
    use_device,
)
from node.imports import uncollected_imports
from node.model.checkpoint.architecture import architecture_of
from node.model.parallel.lost import SpanLost
from node.monitor.metrics.meters import BatchMeters, ServingMeters
from node.monitor.vitals import write_vitals
from node.runtime.compute_thread import Runner, open_compute_thread
from node.runtime.files import write_atomically, write_fault
from node.runtime.nurseries import background_nursery
from node.runtime.watermarks import Guard
from node.serving import memory
from node.serving.balancer import Balancer, by_capacity
from node.serving.memory import Precision
from node.serving.placement.thread_share import (
    NOBODY,
    Presence,
    ThreadShare,
    cores_of_this_process,
    follow,
    presence,
    threads_at_start,
)
from routing.blocks import Blocks
from routing.names import PeerId
from routing.placement.rebalance import choose_blocks
from routing.view.description import describe
from routing.view.records import Record, Role
from routing.view.view import ONLINE_SOON
from tensor_codec.errors import PeerGone
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL
from tensor_codec.messages.info import INFO_FRAME_BYTES, INFO_PROTOCOL
from tensor_codec.messages.session import PUSH_PROTOCOL, SESSION_PROTOCOL
from tensor_codec.span_spec import SpanSpec

if TYPE_CHECKING:
    from node.model.checkpoint.folder import ModelFolder
    from node.model.checkpoint.info import ModelInfo
    from node.monitor.metrics.node import NodeMetrics
    from node.network.directory.directory import Directory
    from node.network.host import Host
    from node.network.lan.discovery import LanDiscovery
    from node.network.reachability.watch import ReachWatch
    from node.network.relaying.service import Relaying
    from node.network.streams import FramedStream
    from node.network.transport.identity import Identity
    from node.serving.adapters.desk import AdapterDesk, OwnAdapter
    from node.serving.placement.placement import Placement
    from node.serving.placement.room import Room
    from node.serving.served_span import ServingSetup
    from node.serving.server import Server

log = logging.getLogger("raceme")

LEAVE_SECONDS = 2.5  # the directory takes 2 at most
UNREACHED_SECONDS = 60.0  # after which a node leaves there: a router that restarts takes as long
REACH_SECONDS = 20.0  # for peers to dial back, and for a relay to be found, where --require-reach says so


async def serve(config: NodeConfig) -> None:
    """Serve a span until SIGINT or SIGTERM, then leave politely.  Raises ConfigError."""
    async with stopped_by_signals() as stopping, open_compute_thread() as compute:
        with presence(_cache_dir()) as present:
            # Two threads that import at once only slow each other down: torch first, then the network.
            await compute.run(_prepare_torch, _threads(config, present))
            await _serve(config, compute, stopping, present)


async def _serve(config: NodeConfig, compute: Runner, stopping: Stopping, present: Presence = NOBODY) -> None:
    """Take part in the network until a signal.  present: nodes on this machine.  Raises ConfigError."""
    from node.serving.placement.ranks import open_placement

    async with open_node(config.network, "serve") as node, background_nursery() as nursery:
        await check_reach(node)
        metrics = await open_metrics(config.network, node, "serve", nursery)
        folder, info = await trio.to_thread.run_sync(_find_model, config, abandon_on_cancel=True)
        await compute.run(_prepare_library, folder)
        devices, dtype, threads = await compute.run(_devices_and_dtype, config)
        model = Model(folder, info, dtype, threads)
        dividing = open_placement(
            devices, folder, compute, ranks=config.tensor_parallel, threads=threads, on_lost=stopping.lose
        )
        async with dividing as placement:
            if config.threads is None:
                share = ThreadShare(cores_of_this_process(), threads, config.tensor_parallel)
                nursery.start_soon(follow, share, present, partial(_use_threads, compute, placement))
            meters = None if metrics is None else metrics.meters
            setup, blocks = await find_setup(config, node, compute, placement, model, meters)
            await _serve_blocks(config, node, setup, blocks, compute, stopping, nursery, metrics)


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a node serves, and the dtype and the threads with which it computes."""

    folder: ModelFolder
    info: ModelInfo
    dtype: str
    threads: int


async def _serve_blocks(
    config: NodeConfig,
    node: Node,
    setup: ServingSetup,
    blocks: Blocks,
    compute: Runner,
    stopping: Stopping,
    nursery: trio.Nursery,
    metrics: NodeMetrics | None,
) -> None:
    """Load the blocks and serve them until a signal.  Raises ConfigError."""
    from node.network.sharing.announcing import keep_announced, keys_of
    from node.serving.server import Server

    def came_online(spec: SpanSpec) -> None:
        write_ready_file(config.network, node, spec, serving=stopping.online)
        tell_how_to_join(node, f"online with blocks {spec.blocks} of {spec.model}")

    server = Server(setup, node.directory, compute, nursery, came_online)
    if metrics is not None:
        metrics.server = server
    node.host.handle(SESSION_PROTOCOL, server.dispatch.serve_session)
    # a hop pushes what a client has arranged, who may have told its hops different things
    node.host.handle(PUSH_PROTOCOL, server.dispatch.serve_push, bans=False)
    node.host.handle(COMPUTE_PROTOCOL, server.dispatch.serve_request)
    node.host.handle(ADAPTER_PROTOCOL, server.dispatch.serve_adapter)
    node.host.handle(INFO_PROTOCOL, server.dispatch.serve_info, max_frame_bytes=INFO_FRAME_BYTES)
    await _begin(server, blocks)
    nursery.start_soon(server.keep_record_true)
    if (table := node.directory.table) is not None and setup.shared:
        keys = keys_of(setup.shared, node.host.swarm_id)
        nursery.start_soon(keep_announced, table, keys, random.Random())
    nursery.start_soon(guard_of(config.network, node, server).run)
    if config.vitals_file is not None:
        nursery.start_soon(
            write_vitals, config.vitals_file, lambda: node.host.connections, lambda: server.session_count
        )
    stopping.started()
    nursery.start_soon(leave_unreached, node, stopping)
    nursery.start_soon(keep_telling, node)
    async with background_nursery() as moving:
        if config.blocks is None:
            rng = random.Random()
            better = by_capacity(config.balance, rng, 2 * setup.info.hidden_size)
            balancer = Balancer(server, config.balance, rng, better, node.directory.answers)
            moving.start_soon(balancer.run)
        await stopping.requested.wait()
    log.info("leaving, %d sessions are open", server.session_count)
    await server.leave()
    stopping.check()


async def _begin(server: Server, blocks: Blocks) -> None:
    """Load the blocks and serve them.  Raises ConfigError."""
    try:
        await server.begin(blocks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        setup = server.setup
        raise ConfigError(
            f"memory of {setup.placement} ended while blocks {blocks} were loaded, with"
            f" {setup.cache_tokens:,} cache tokens: other programs take it; choose fewer"
            " (--num-blocks, --cache-tokens)"
        ) from None


async def run_bootstrap(config: NetworkConfig) -> None:
    """Be a directory, without a model, until SIGINT or SIGTERM.  Raises ConfigError."""
    async with (
        stopped_by_signals() as stopping,
        open_node(config, "bootstrap") as node,
        background_nursery() as nursery,
    ):
        await check_reach(node)
        nursery.start_soon(guard_of(config, node).run)
        await open_metrics(config, node, "bootstrap", nursery)
        await node.directory.announce(Record(role="bootstrap", name=config.name, version=VERSION))
        write_ready_file(config, node, None)
        tell_how_to_join(node, "online as a bootstrap node")
        stopping.started()
        nursery.start_soon(leave_unreached, node, stopping)
        nursery.start_soon(keep_telling, node)
        await stopping.requested.wait()
    stopping.check()


async def check_reach(node: Node) -> None:
    """Where the operator requires it: find out whether others reach this node.

    Raises ConfigError where nobody does.  A node that finds nobody to ask goes on, and says so.
    """
    if not node.config.require_reach or node.reach is None:
        return
    found = await node.reach.known(REACH_SECONDS)
    if found.reach == "none":
        raise ConfigError(node.reach.summary)
    if found.reach == "unknown":
        log.warning("--require-reach: %s", node.reach.summary)


async def leave_unreached(node: Node, stopping: Stopping) -> None:
    """Where the operator requires reach: leave when the node has lost it for UNREACHED_SECONDS."""
    if node.config.require_reach and node.reach is not None:
        await node.reach.lost(UNREACHED_SECONDS)
        stopping.lose(node.reach.summary)


async def open_metrics(
    config: NetworkConfig, node: Node, role: Role, nursery: trio.Nursery
) -> NodeMetrics | None:
    """Serve metrics where the operator asks for them; None where not.  Raises ConfigError."""
    if (address := config.metrics_address) is None:
        return None
    from node.monitor.metrics.endpoint import open_endpoint, pages_of
    from node.monitor.metrics.node import NodeMetrics

    metrics = NodeMetrics(
        role, node.host, ServingMeters(batches=BatchMeters()),
        facts=lambda: describe(node.directory.view(), node.directory.rtts()),
        relayed_bytes=lambda: 0 if node.relaying is None else node.relaying.relayed_bytes,
    )  # fmt: skip
    await open_endpoint(address, pages_of(metrics), config.limits, nursery)
    return metrics


def guard_of(config: NetworkConfig, node: Node, server: Server | None = None) -> Guard:
    """Keeps the node within its descriptors, and a server within its stated memory."""
    if server is None or server.setup.stated is None:
        return Guard(config.limits, node.host.connections)
    bound = server.setup.stated.bound_after_loading(memory.process_bytes())
    return Guard(
        config.limits, node.host.connections, server.dispatch, lambda: None if server.moving else bound
    )


async def find_setup(
    config: NodeConfig,
    node: Node,
    compute: Runner,
    placement: Placement,
    model: Model,
    meters: ServingMeters | None = None,
) -> tuple[ServingSetup, Blocks]:
    """Choose the blocks of a model, their precision and the caches.  Raises ConfigError."""
    from node.serving.served_span import ServingSetup

    limits, device, dtype, threads = config.network.limits, placement.device, model.dtype, model.threads
    own = await compute.run(_own_adapters, config, model.folder) if config.adapters else []
    quantize, product = _quantize(config, model.info, device)
    room = await compute.run(placement.room)
    process = memory.process_bytes()
    architecture = architecture_of(model.info.architecture)
    computes, cache = await compute.run(
        _activations, dtype, product or quantize, device, config.kv_cache_dtype, architecture.fused
    )
    precision = Precision(dtype, quantize, computes, product, packs=config.codec == "auto", cache=cache)
    _warn_of_overflow(model.info, precision)
    known = await compute.run(known_seconds_per_block, model.info, placement, precision, threads)
    info = placement.sized(model.info)
    blocks = await _choose_blocks(config, node, info, precision, room, known)
    cache_tokens = config.cache_tokens or room.cache_tokens_that_fit(info, blocks.size, precision)
    room.check_fits(info, blocks.size, precision, cache_tokens, limits.max_step_tokens)
    journal_tokens = config.journal_tokens
    if journal_tokens is None:
        journal_tokens = memory.journal_tokens_that_fit(info, cache_tokens, device, memory.free_bytes())
    training = room.training_bytes_that_fit(
        info, blocks.size, precision, cache_tokens, limits.max_step_tokens
    )
    span_alone = memory.memory_of(
        info, blocks.size, precision, cache_tokens,
        device=device, limits=limits, process=process, journal_tokens=journal_tokens,
    )  # fmt: skip
    where = f"{placement} ({found})" if (found := hardware(placement.device)) else str(placement)
    log.info(
        "loading blocks %s of %s (revision %s) as %s, quantize %s, on %s, %d thread%s",
        blocks, info.name, info.revision, dtype, precision.packing, where, threads, "s" * (threads > 1),
    )  # fmt: skip
    bound = replace(span_alone, training=training, reserve=room.reserved_bytes(info, precision))
    if not placement.takes_adapters:
        bound = replace(bound, adapters=0, sums=0, trained=0)
    of_each = "" if placement.team is None else f"on each of {len(placement.devices)} devices: "
    log.info("%s%s", of_each, memory.in_one_line(bound, info, blocks.size, cache_tokens, room.free_bytes))
    setup = ServingSetup(
        model.folder, model.info, config.network.name, placement, precision, cache_tokens,
        journal_tokens, limits, partial(node.open_stream, protocol=PUSH_PROTOCOL), node.host.faults, training,
        bound, _open_desk(node, model.info, placement, bound, own), meters or ServingMeters(),
    )  # fmt: skip
    return setup, blocks


def _open_desk(
    node: Node, info: ModelInfo, placement: Placement, bound: memory.Memory, own: Sequence[OwnAdapter]
) -> AdapterDesk | None:
    """The node's adapters; None where it takes none."""
    from node.serving.adapters.desk import open_desk
    from node.serving.adapters.own_cards import sign_own

    if not placement.takes_adapters:
        return None
    limits = node.config.limits
    return open_desk(
        limits, info.blocks, placement.device, bound.adapters, bound.sums, own,
        sign=partial(sign_own, node.identity, info.name, limits),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A process in the network: its host, its view of the swarm, its reach.  Made by `open_node`."""

    config: NetworkConfig
    host: Host
    directory: Directory
    identity: Identity
    reach: ReachWatch | None = None
    relaying: Relaying | None = None
    lan: LanDiscovery | None = None

    @property
    def joining_address(self) -> str:
        """The address that others pass to --peers: another node's where nobody can dial this one."""
        own = None if self.reach is None else self.reach.own
        if own is not None and own.reach in ("relayed", "none") and self.config.peers:
            return self.config.peers[0]
        addresses = (() if own is None else own.addresses) or self.host.addresses
        return f"{addresses[0]}/p2p/{self.host.peer_id}"

    async def open_stream(self, peer: PeerId, protocol: str) -> FramedStream:
        """A stream to a peer of our own verified view.  Raises PeerGone, SlowPeer, NotAMember."""
        view = self.directory.view()
        record = view.get(peer)
        if record is None or not self.directory.is_vouched(peer):
            raise PeerGone(f"{peer} is not in our view of the swarm")
        seconds = self.config.limits.dial_seconds
        stream = await self.host.open_stream(peer, view.dialled_at(record), protocol, seconds=seconds)
        stream.batches = record.batches
        return stream


@asynccontextmanager
async def open_node(config: NetworkConfig, role: Role) -> AsyncIterator[Node]:
    """A host in the swarm's directory; at its end, the node announces that it leaves.  Raises ConfigError."""
    from node.network.joining import join

    async with join(config, role) as joined:
        try:
            own = joined.identity
            yield Node(config, joined.host, joined.directory, own, joined.reach, joined.relaying, joined.lan)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LEAVE_SECONDS):
                await joined.directory.leave()


@dataclass(slots=True)
class Stopping:
    """First signal: abort while the node is starting, else shut down politely.  Second: abort."""

    requested: trio.Event
    scope: trio.CancelScope
    online: bool = False
    fault: str | None = None  # why the node ends without a signal

    def started(self) -> None:
        """The node is online: from now on the first signal only sets `requested`."""
        self.online = True

    def lose(self, why: str) -> None:
        """The node cannot go on: it is to leave as after a signal, and then to say why."""
        if self.fault is None:
            self.fault = why
        self.requested.set()

    def check(self) -> None:
        """Raise SpanLost where that was so: exit code 2."""
        if self.fault is not None:
            raise SpanLost(self.fault)

    async def watch(self, signals: AsyncIterator[int]) -> None:
        """Act on each signal."""
        async for number in signals:
            log.info("%s received", signal.Signals(number).name)
            if self.requested.is_set() or not self.online:
                self.scope.cancel()
            self.requested.set()


@asynccontextmanager
async def stopped_by_signals() -> AsyncIterator[Stopping]:
    """Run the block until it ends or SIGINT or SIGTERM says so."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with background_nursery() as nursery:
            stopping = Stopping(trio.Event(), nursery.cancel_scope)
            nursery.start_soon(stopping.watch, signals)
            yield stopping


def _find_model(config: NodeConfig) -> tuple[ModelFolder, ModelInfo]:
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.progress import progress_bar
    from node.model.checkpoint.source import cache_dir, resolve

    with progress_bar(sys.stderr) as progress:
        folder = resolve(
            config.model, cache_dir=cache_dir(), progress=progress, max_disk_bytes=config.max_disk_bytes
        )
    return folder, read_info(folder)


def _own_adapters(config: NodeConfig, folder: ModelFolder) -> list[OwnAdapter]:
    """Runs in the torch thread: the adapters that the node keeps for everybody.  Raises ConfigError."""
    from node.serving.adapters.own import own_adapters

    return own_adapters(config.adapters, folder, config.network.limits)


def known_seconds_per_block(
    info: ModelInfo, placement: Placement, precision: Precision, threads: int
) -> float:
    """Seconds of a decode step through one block in an earlier run of this kind; 0 without an earlier run.

    Runs in the torch thread.
    """
    file, key = placement.kept_rates(info.revision, precision, threads)
    known = file.get(key)
    return 0.0 if known is None else known.alone


def _quantize(config: NodeConfig, info: ModelInfo, device: str) -> tuple[str, str]:
    """How matrices are kept, and how they are multiplied where that leaves a choice."""
    if config.quantize == LLM_INT8:
        return "int8", LLM_INT8
    if info.quantize != "none":
        return info.quantize, ""
    # int8 where it costs no speed; and the CPU's users chose their dtype for a reason
    return config.quantize or ("int8" if kind_of(device) == "cuda" else "none"), ""


def _warn_of_overflow(info: ModelInfo, precision: Precision) -> None:
    from node.model.checkpoint.architecture import OVERFLOW_FLOAT16

    if precision.computes == "float16" and info.architecture in OVERFLOW_FLOAT16:
        log.warning(
            "%s: hidden states of %s exceed float16, steps will fail; --dtype float32 computes them",
            info.name, info.architecture,
        )  # fmt: skip


async def _choose_blocks(
    config: NodeConfig,
    node: Node,
    info: ModelInfo,
    precision: Precision,
    room: Room,
    seconds_per_block: float,
) -> Blocks:
    """The blocks to serve: the config's, else the blocks that the swarm needs most.  Raises ConfigError.

    seconds_per_block: of this node; 0 where unknown: then the median of the others counts.
    """
    if config.blocks is not None:
        whole = Blocks(0, info.blocks)
        if not whole.contains(config.blocks):
            raise ConfigError(f"blocks {config.blocks} of {info.name}, which has {whole}")
        return config.blocks
    count = config.num_blocks or room.blocks_that_fit(info, precision, config.cache_tokens)
    if not 0 < count <= info.blocks:
        if config.num_blocks is None:
            cache_tokens = config.cache_tokens or memory.MIN_CACHE_TOKENS
            room.check_fits(info, 1, precision, cache_tokens)
        raise ConfigError(f"{count} blocks of {info.name}, which has {info.blocks}")
    if node.lan is not None:
        await node.lan.start.settled()
    spans = node.directory.view().spans(info.revision, info.blocks, ONLINE_SOON)
    return choose_blocks(
        spans,
        info.blocks,
        count,
        random.Random(),
        seconds_per_block=seconds_per_block,
        min_replicas=config.balance.min_replicas,
        position_bytes=2 * info.hidden_size,
    )


def _prepare_torch(threads: int) -> None:
    """Runs in the torch thread: the seconds of importing, and the number of threads that it may use."""
    set_up_allocator()
    with uncollected_imports():
        import torch

        import node.network.joining
        import node.serving.server  # noqa: F401
        from node.model.blocks.fused_block import decode_kernels

        decode_kernels()
    torch.set_num_threads(threads)


def _prepare_library(folder: ModelFolder) -> None:
    """Runs in the torch thread: imports for a model that the library computes, before memory is measured."""
    from node.model.llama.config import config_of

    if config_of(folder.config) is None:
        with uncollected_imports():
            import transformers.modeling_utils  # noqa: F401


def _cache_dir() -> Path | None:
    """The user's cache; None where the home folder is not known, which whoever needs it will say."""
    from node.model.checkpoint.source import cache_dir

    try:
        return cache_dir()
    except ConfigError:
        return None


async def _use_threads(compute: Runner, placement: Placement, threads: int, nodes: int) -> None:
    """Compute with so many threads in each process of the node, from the next batch on."""
    import torch

    if placement.team is not None:
        placement.team.use_threads(threads)
    await compute.run(torch.set_num_threads, threads)
    torch.set_num_threads(threads)  # torch asks the calling thread, and a step may be computed in this one
    each = "" if placement.team is None else f" in each of {len(placement.devices)} processes"
    many = nodes > 1
    log.info(
        "%d thread%s%s from now on: %d node%s serve%s on this machine",
        threads, "s" * (threads > 1), each, nodes, "s" * many, "" if many else "s",
    )  # fmt: skip


def _threads(config: NodeConfig, present: Presence) -> int:
    """Of torch in this process."""
    if config.threads is not None:
        return config.threads
    return threads_at_start(present, config.tensor_parallel)


def _devices_and_dtype(config: NodeConfig) -> tuple[tuple[str, ...], str, int]:
    """Runs in the torch thread: devices, dtype and threads on this machine.  Raises ConfigError."""
    import torch

    with config_errors():
        devices = find_devices(config.devices, config.tensor_parallel)
    if config.dtype != "auto":
        dtype = config.dtype
    else:
        # Of several the one that all have.  A rank's device is left to its rank.
        asked = devices if config.tensor_parallel == 1 else devices[:1]
        dtype = max({best_dtype(device) for device in asked}, key=("bfloat16", "float16", "float32").index)
    use_device(devices[0])
    return devices, dtype, torch.get_num_threads()


def _activations(dtype: str, quantize: str, device: str, chosen: str, fused: bool) -> tuple[str, str]:
    """The dtypes of a span's hidden states and of its caches on this machine.  Runs in the torch thread.

    chosen: of the caches, by the operator.  fused: see `Architecture`.  Raises ConfigError.
    """
    from node.model.blocks.span import DTYPES
    from node.model.weights.quantize import cache_dtype_for, has_bfloat16, packing_for

    names = {known: name for name, known in DTYPES.items()}
    packing = packing_for(quantize, DTYPES[dtype], kind_of(device), bfloat16=has_bfloat16())
    return names[packing.dtype], names[cache_dtype_for(chosen, packing, kind_of(device), fused=fused)]


def write_ready_file(
    config: NetworkConfig, node: Node, spec: SpanSpec | None, *, serving: bool = False
) -> None:
    """Write the facts of a node that is online; the file appears whole or not at all.

    serving: the file is written anew after a move; where it cannot be written, the log says so and the node
    serves on.  Raises ConfigError where it cannot be written at the start.
    """
    if config.ready_file is None:
        return
    facts = {
        "peer_id": node.host.peer_id,
        "addresses": [f"{address}/p2p/{node.host.peer_id}" for address in node.host.addresses],
        "model": spec.model if spec else None,
        "revision": spec.revision if spec else None,
        "blocks": list(spec.blocks) if spec else None,
        "pid": os.getpid(),
    }
    if not config.ready_file.name:
        raise ConfigError(f"the ready file {config.ready_file} is a folder, a file is needed")
    try:
        write_atomically(config.ready_file, json.dumps(facts).encode())
    except OSError as error:
        fault = f"cannot write the ready file {config.ready_file}: {write_fault(error, config.ready_file)}"
        if not serving:
            raise ConfigError(fault) from None
        log.error("%s; it still has the facts from before the move", fault)


def tell_how_to_join(node: Node, what: str) -> None:
    """Log that the node is online, and the flags with which others join it."""
    log.info("%s, peer %s", what, node.host.peer_id)
    _tell_peers(node)


def _tell_peers(node: Node) -> str:
    """Log the address for --peers; returns it."""
    key = f" --swarm-key {node.config.swarm_key}" if node.config.swarm_key else ""
    log.info("others join with: --peers %s%s", address := node.joining_address, key)
    return address


async def keep_telling(node: Node) -> None:
    """Log the address for --peers again whenever it is another one: peers find out which is right."""
    if node.reach is None:
        return
    said = node.joining_address
    while True:
        await node.reach.changed()
        if node.joining_address != said:
            said = _tell_peers(node)
