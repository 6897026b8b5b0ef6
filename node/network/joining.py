"""A process in the swarm's network: its host and its directory."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from node.config import NetworkConfig
from node.network.addresses import bootstrap_peers
from node.network.directory.directory import Directory, DirectoryConfig, open_directory
from node.network.host import Host, open_host
from node.network.lan.discovery import LanDiscovery, open_lan
from node.network.mapping.mapper import open_mapper
from node.network.reachability.asking import Questions
from node.network.reachability.listener import ReachListener
from node.network.reachability.routes import named_in_record, public_addresses, relay_candidates, routes_to
from node.network.reachability.seen import learn_seen
from node.network.reachability.watch import ReachWatch
from node.network.relaying.own_reservations import Candidate
from node.network.relaying.service import Relaying, open_relaying
from node.network.transport.identity import Identity, held_identity
from node.network.transport.membership import load_swarm_key, swarm_id
from node.runtime.nurseries import background_nursery
from routing.view.records import Role
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import REACH_PROTOCOL

log = logging.getLogger("raceme")


@dataclass(frozen=True, slots=True)
class Joined:
    """A process that has joined.  Made by `join`.

    reach: whether others can dial it; a client never finds out.
    relaying: what it does about relays.
    lan: the local network, where it joins what is there.
    """

    host: Host
    directory: Directory
    identity: Identity
    reach: ReachWatch
    relaying: Relaying
    lan: LanDiscovery | None = None


@asynccontextmanager
async def join(config: NetworkConfig, role: Role) -> AsyncIterator[Joined]:
    """Take part in a swarm's network until the end of the block.  Raises ConfigError."""
    key = load_swarm_key(config.swarm_key) if config.swarm_key is not None else None
    with held_identity(config.identity) as identity:
        async with (
            open_host(
                identity=identity,
                listen=config.listen,
                announce=config.announce,
                swarm_key=key,
                limits=config.limits,
            ) as host,
            open_relaying(host, reservations=_reservations(config, role)) as relaying,
            open_directory(
                host,
                identity,
                DirectoryConfig(
                    swarm=swarm_id(key),
                    bootstrap=config.peers,
                    role=role,
                    limits=config.limits,
                    patience_seconds=config.patience_seconds,
                    relayed_bytes=lambda: relaying.relayed_bytes,
                ),
            ) as directory,
            background_nursery() as nursery,
            AsyncExitStack() as stack,
        ):
            reach = _watch_reach(host, directory, config, role, nursery)
            _use_relays(host, directory, reach, relaying)
            lan = await _use_the_local_network(config, role, host, directory, reach, stack)
            if config.relays:
                _ask_chosen(host, relaying, config.relays)
            yield Joined(host, directory, identity, reach, relaying, lan)


def _watch_reach(
    host: Host, directory: Directory, config: NetworkConfig, role: Role, nursery: trio.Nursery
) -> ReachWatch:
    """Start what finds out how others reach this process."""
    limits, rng = config.limits, random.Random()
    questions = Questions(host, limits)
    watch = ReachWatch(questions, directory.view, directory.addresses, directory.set_reach, limits, rng)
    if role == "client":
        _learn_own_address(questions, directory, nursery, limits)
    else:
        listener = ReachListener(limits, host.probe)
        watch.hooks.askers = lambda: listener.askers
        host.handle_bytes(REACH_PROTOCOL, listener.serve)
        nursery.start_soon(watch.run)
    return watch


async def _use_the_local_network(
    config: NetworkConfig,
    role: Role,
    host: Host,
    directory: Directory,
    reach: ReachWatch,
    stack: AsyncExitStack,
) -> LanDiscovery | None:
    """Have the router forward our ports, and join the peers of the local network, as far as configured.

    A server waits for the first one: it is about to choose its blocks.  Returns what finds them, if it does.
    """

    def listening() -> Sequence[str]:
        return host.own.found

    if all(address.is_loopback for address in host.own.listening):
        return None
    if config.port_mapping and not config.announce:
        mapper = await stack.enter_async_context(open_mapper(listening, reach.offer, peer=host.peer_id))
        reach.hooks.on_failed_offer = mapper.look_again
    if config.lan is False:
        return None
    swarm = host.swarm_id
    lan = await stack.enter_async_context(open_lan(host.peer_id, swarm, listening, config.limits))
    if not config.looks_in_lan:
        return None
    nursery = await stack.enter_async_context(background_nursery())
    nursery.start_soon(lan.introduce, directory.meet, lambda peer: directory.view().get(peer) is not None)
    if role == "serve" and not await lan.start.first_peer() and not config.peers:
        log.info("no node of the swarm %r answers in the local network: this one starts it there", swarm)
    return lan


def _use_relays(host: Host, directory: Directory, reach: ReachWatch, relaying: Relaying) -> None:
    """Find relays in the swarm where nobody reaches this node, and the relays of others."""
    keeper = relaying.keeper
    dial_relayed_peers(host, directory, relaying)
    keeper.candidates = lambda: relay_candidates(directory.view(), directory.rtts(), host.peer_id)
    keeper.wanted = lambda: reach.wants_relays
    is_public = host.swarm_id == swarm_id(None)
    keeper.on_change = lambda relays: reach.set_relays(
        *named_in_record(relays, keeper.chosen, is_public=is_public)
    )
    reach.hooks.on_change = keeper.look_soon
    reach.hooks.seen_by_relays = lambda: {each.host for each in keeper.plan.seen_at}
    if relaying.relay is not None:
        reach.set_helps(host.dialler.circuits.limits.relay_bytes_per_second * 8 // 1_000_000)


def dial_relayed_peers(host: Host, directory: Directory, relaying: Relaying) -> None:
    """Dial peers through their relays, and dial peers back that listen in public, as records say."""
    host.dialler.circuits.routes_to = lambda peer: routes_to(directory.view(), directory.rtts(), peer)
    relaying.punching.public_addresses = lambda peer: public_addresses(directory.view(), peer)


def use_ways_of_others(
    host: Host, directory: Directory, relaying: Relaying, nursery: trio.Nursery, limits: Limits
) -> None:
    """What a program that only dials needs: relays of others, and its own address on the Internet.

    Without it a server in the same house is not known as such.
    """
    dial_relayed_peers(host, directory, relaying)
    _learn_own_address(Questions(host, limits), directory, nursery, limits)


def _learn_own_address(
    questions: Questions, directory: Directory, nursery: trio.Nursery, limits: Limits
) -> None:
    view, addresses, found = directory.view, directory.addresses, directory.set_seen
    nursery.start_soon(learn_seen, questions, view, addresses, found, limits, random.Random())


def _reservations(config: NetworkConfig, role: Role) -> int:
    """The peers that a node of this role relays to."""
    if not config.relay or role not in ("serve", "bootstrap"):
        return 0
    limits = config.limits
    return limits.max_bootstrap_reservations if role == "bootstrap" else limits.max_reservations


def _ask_chosen(host: Host, relaying: Relaying, multiaddrs: Sequence[str]) -> None:
    """Keep reservations at the relays that the operator has named.  Raises ConfigError."""
    host.configure_peers(multiaddrs)
    relaying.keeper.chosen = [
        Candidate(peer, addresses, is_chosen=True) for peer, addresses in bootstrap_peers(multiaddrs).items()
    ]
