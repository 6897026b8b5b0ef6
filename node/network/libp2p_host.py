"""py-libp2p's host, kept for identify, with its traps closed.

It neither listens nor dials: `Host` hands it finished connections, secured and muxed.  This avoids, in
py-libp2p 0.8:

* dials that take 250 ms after they succeeded, try one address only, and refuse for 60 s a peer that
  failed once (`Swarm.dial_peer`, overridden here);
* an auto-connector that tops up towards half of the high watermark (replaced here);
* listeners with SO_REUSEPORT, so that a port in use is not noticed, and without any TCP option;
* a muxer table that takes its own yamux for any class that is passed in;
* a resource manager whose absence is not noticed (asserted here; the exact caps are `Host`'s own).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from node.network.budgets.libp2p_streams import Libp2pStreams, ServedStream
from node.network.transport.identity import Identity
from tensor_codec.limits import Limits

logger = logging.getLogger(__name__)
# py-libp2p logs peers' faults as errors; our adapter counts them instead.  Here, because its own
# import sets the level, and takes its loggers out of the reach of an earlier set-up of logging.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)

# It hears of the end of a connection 100 ms later, and until then counts it next to the one that replaced it
_SLACK = 64


class NoAutoConnector(AutoConnector):  # type: ignore[misc]  # py-libp2p has no types
    """Connects to no peer: our own directory chooses our peers."""

    async def maybe_connect(self) -> None:
        """Do nothing."""


class HostedSwarm(Swarm):  # type: ignore[misc]  # py-libp2p has no types
    """py-libp2p's table of connections; it dials nobody."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.auto_connector = NoAutoConnector(self)

    async def dial_peer(self, peer_id: ID) -> list[Any]:
        """The connections to a peer.  Raises SwarmException where there are none."""
        if not (connections := list(self.get_connections(peer_id))):
            raise SwarmException(f"there is no connection to {peer_id}, and py-libp2p makes none here")
        return connections


def make_libp2p_host(identity: Identity, addresses: Callable[[], Sequence[str]], limits: Limits) -> BasicHost:
    """A host that announces the result of `addresses`, and dials nobody; run it with `host.run([])`."""
    key_pair = create_new_key_pair(seed=identity.private_key)
    peer_id = ID.from_base58(identity.peer_id)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer_id, key_pair)
    swarm = HostedSwarm(
        peer_id,
        peerstore,
        TransportUpgrader({}, {}),  # no security and no muxer: every connection comes through us
        transports=[],
        connection_config=ConnectionConfig(
            # `Host` counts exactly; these bounds must only be larger
            max_connections=limits.max_connections + _SLACK,
            high_watermark=limits.max_connections + _SLACK,
            min_connections=0,
            low_watermark=0,
            max_connections_per_peer=limits.max_connections_per_peer + limits.max_circuits_per_peer + 1,
            inbound_stream_protocol_negotiation_timeout=limits.negotiation_seconds,
            outbound_stream_protocol_negotiation_timeout=limits.negotiation_seconds,
        ),
    )
    resources = ResourceManager(
        limits=ResourceLimits(
            max_connections=limits.max_connections + _SLACK, max_streams=limits.max_streams
        ),
        enable_metrics=False,
        enable_connection_tracking=False,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )
    host = BasicHost(
        swarm,
        resource_manager=resources,
        negotiate_timeout=int(limits.negotiation_seconds),
        addrs_factory=lambda _candidates: [Multiaddr(address) for address in addresses()],
        disable_identify_address_discovery=True,
    )
    assert swarm._resource_manager is resources, "py-libp2p runs without its resource manager"

    swarm.set_stream_handler(partial(_serve, host, Libp2pStreams(limits), limits.libp2p_stream_seconds))
    return host


async def _serve(host: BasicHost, places: Libp2pStreams, seconds: float, net_stream: Any) -> None:
    """One stream of py-libp2p's own protocols, which `Host` has negotiated; it ends within `seconds`."""
    connection, protocol = net_stream.muxed_conn, net_stream.muxed_stream.protocol
    net_stream.set_protocol(protocol)
    scope = trio.CancelScope(deadline=trio.current_time() + seconds)
    peer = str(connection.peer_id)
    place = ServedStream(protocol, peer, connection.prefix, trio.current_time(), scope.cancel)
    if not places.enter(place):
        await net_stream.reset()
        return
    try:
        with scope:
            await host.get_mux().handlers[protocol](net_stream)
    # Of the library's 1,126 handlers 716 catch everything themselves.  An error that escapes is of any
    # type and counts as the peer's fault.  It must not end the node.
    except Exception as error:  # noqa: BLE001
        logger.debug("%s on a stream of %s: %r", protocol, peer, error)
        await net_stream.reset()
    finally:
        places.leave(place)
    if scope.cancelled_caught:
        await net_stream.reset()
