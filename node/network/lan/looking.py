"""A client looks for the nodes of its local network, in place of --peers, and announces nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from node.config import ConfigError
from node.network.addresses import Address
from node.network.lan.announcement import interfaces_of, read_announcement
from node.network.lan.multicast import LanError, Multicast, ZeroconfMulticast
from node.network.own_addresses import find_own_addresses
from node.network.transport.membership import load_swarm_key, swarm_id
from tensor_codec.limits import Limits

LOOK_SECONDS = 4.0  # for a first answer, which takes 0.5 s (seen)
MORE_SECONDS = 0.3  # for others, after the first one
MAX_PEERS = 8  # whoever is in the network can answer under any number of names


def find_peers(
    swarm_key: Path | None,
    find_hosts: Callable[[], tuple[str, ...]] | None = None,
    make: Callable[[], Multicast] = ZeroconfMulticast,
) -> tuple[str, ...]:
    """Up to MAX_PEERS multiaddrs of nodes of the swarm that announce themselves.  Raises ConfigError.

    find_hosts: this machine's private IPv4 addresses.  Nobody is dialled here: to connect proves the ids.
    """
    swarm = swarm_id(load_swarm_key(swarm_key) if swarm_key is not None else None)
    hosts = (find_hosts or _private_hosts)()
    if not hosts:
        raise ConfigError("this machine has no private network, where --lan could find a node: give --peers")
    found: dict[str, None] = {}
    first = threading.Event()

    def heard(text: bytes) -> None:
        if (peer := read_announcement(text, swarm, Limits())) is not None and len(found) < MAX_PEERS:
            found.update(dict.fromkeys(f"{address}/p2p/{peer.peer}" for address in peer.addresses))
            first.set()

    multicast = make()
    try:
        multicast.open(hosts, heard)
        if first.wait(LOOK_SECONDS):
            time.sleep(MORE_SECONDS)
    except LanError as error:
        raise ConfigError(f"--lan finds nobody: {error}") from None
    finally:
        multicast.close()
    if not found:
        raise ConfigError(
            f"no node of the swarm {swarm!r} answers in the local network ({', '.join(hosts)})"
            f" within {LOOK_SECONDS:g} s: start one there with --lan, or give --peers"
        )
    return tuple(found)


def _private_hosts() -> tuple[str, ...]:
    return interfaces_of(find_own_addresses((), [Address("ip4", "0.0.0.0", 1)]).found)
