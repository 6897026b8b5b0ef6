"""A peer without a model that does what lines of JSON on standard input say, on a host of a lab.

    python -m benchmarks.reach.peer [--peers MULTIADDR ...] [--listen MULTIADDR] [--swarm-key FILE]

A worker of `benchmarks reach`.  It takes part as a bootstrap node does: others see its record, it relays
where it may, and is relayed where it must be.  The first line that it says holds `peer` and `addresses`.
Each order has an answer: {"error": TEXT} where a peer was at fault.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from node.config import VERSION, NetworkConfig
from node.main import Node, open_node
from node.network.streams import FramedStream
from routing.names import PeerId
from routing.view.records import Record
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.limits import MIB, Limits

ECHO, SINK = "/raceme/bench-echo/1", "/raceme/bench-sink/1"
FRAME_BYTES = 1 * MIB
LOOK_SECONDS = 0.005  # between two looks at what is waited for
SECONDS = 30.0  # for one order

Order = Mapping[str, Any]  # Any: JSON


async def serve_lines(config: NetworkConfig) -> None:
    """Join, then obey until standard input ends."""
    async with open_node(config, "bootstrap") as node:
        host = node.host
        host.handle(ECHO, _echo)
        host.handle(SINK, _sink)
        await node.directory.announce(Record(role="bootstrap", name=config.name, version=VERSION))
        addresses = [f"{address}/p2p/{host.peer_id}" for address in host.addresses]
        _say({"peer": host.peer_id, "addresses": addresses})
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = json.loads(line)
            try:
                with trio.fail_after(order.get("seconds", SECONDS)):
                    answer = await ORDERS[order["do"]](node, order)
            except (PeerFault, Refused, trio.TooSlowError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            _say(answer)


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


# --- what others ask of this peer ---


async def _echo(stream: FramedStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(bytes(frame))


async def _sink(stream: FramedStream) -> None:
    """Take every frame; answer an empty one."""
    while (frame := await stream.receive()) is not None:
        if not frame:
            await stream.send(b"")


# --- the orders ---


async def connect(node: Node, order: Order) -> Order:
    """seconds: until there is a connection to `peer` by the dialler's own choice of ways.

    addresses: those of its record where the order has none.  configured: they count as an operator's own.
    """
    peer, began = PeerId(order["peer"]), time.perf_counter()
    addresses: list[str] | None = order.get("addresses")
    if addresses is None:
        await (await node.open_stream(peer, ECHO)).reset()
    else:
        if order.get("configured"):
            node.host.configure_peers(addresses)
        await node.host.connect(peer, addresses, seconds=order.get("seconds", SECONDS))
    return {"seconds": time.perf_counter() - began, **_way(node, peer)}


async def through(node: Node, order: Order) -> Order:
    """seconds: until there is a connection to `peer` through the relay `relay`."""
    began = time.perf_counter()
    await node.host.dialler.dial_through(PeerId(order["relay"]), PeerId(order["peer"]))
    return {"seconds": time.perf_counter() - began}


async def way(node: Node, order: Order) -> Order:
    """way: of the connection to `peer` in use."""
    return _way(node, PeerId(order["peer"]))


async def until_direct(node: Node, order: Order) -> Order:
    """seconds: until the connection to `peer` in use is a direct one."""
    peer, began = PeerId(order["peer"]), time.perf_counter()
    while _way(node, peer)["way"] != "direct":  # noqa: ASYNC110  nothing tells of it
        await trio.sleep(LOOK_SECONDS)
    return {"seconds": time.perf_counter() - began}


def _way(node: Node, peer: PeerId) -> Order:
    live = node.host.connections.live(peer)
    if live is None:
        return {"way": "none"}
    return {"way": "direct" if live.relayed_by is None else "circuit"}


async def echo(node: Node, order: Order) -> Order:
    """seconds: of each of `rounds` round trips of `size` bytes to `peer`."""
    stream = await node.host.open_stream(PeerId(order["peer"]), (), ECHO, seconds=SECONDS)
    frame, seconds = bytes(order["size"]), []
    for _ in range(order["rounds"]):
        began = time.perf_counter()
        await stream.send(frame)
        await stream.receive()
        seconds.append(time.perf_counter() - began)
    await stream.aclose()
    return {"seconds": seconds}


async def bulk(node: Node, order: Order) -> Order:
    """seconds: for `mib` MiB to `peer`, until it has all of them."""
    stream = await node.host.open_stream(PeerId(order["peer"]), (), SINK, seconds=SECONDS)
    frame, began = bytes(FRAME_BYTES), time.perf_counter()
    for _ in range(order["mib"]):
        await stream.send(frame)
    await stream.send(b"")
    await stream.receive()
    seconds = time.perf_counter() - began
    await stream.aclose()
    return {"seconds": seconds}


async def records(node: Node, order: Order) -> Order:
    """peers: by its id, for each record of the view, its facts that matter here."""
    return {
        "peers": {
            record.peer: {
                "addresses": list(record.addresses),
                "state": record.state,
                "reach": record.reach,
                "relays": list(record.relays),
            }
            for record in node.directory.view().records()
        }
    }


async def relayed(node: Node, order: Order) -> Order:
    """bytes: that this node has carried for others, both ways, so far."""
    return {"bytes": 0 if node.relaying is None else node.relaying.relayed_bytes}


async def until_reach(node: Node, order: Order) -> Order:
    """seconds: until the record of `peer` says one of `reach`; reach: what it says.

    reach: where the order has none, all but "unknown" are awaited.
    """
    peer, began = PeerId(order["peer"]), time.perf_counter()
    awaited = order.get("reach", ["public", "relayed", "none"])
    while True:
        record = node.directory.view().get(peer)
        if record is not None and record.reach in awaited:
            return {"seconds": time.perf_counter() - began, "reach": record.reach, "at": time.time()}
        await trio.sleep(LOOK_SECONDS)


async def until_relays(node: Node, order: Order) -> Order:
    """seconds: until the record of `peer` names `count` relays."""
    peer, began = PeerId(order["peer"]), time.perf_counter()
    while True:
        record = node.directory.view().get(peer)
        if record is not None and len(record.relays) >= order["count"]:
            return {"seconds": time.perf_counter() - began}
        await trio.sleep(LOOK_SECONDS)


async def until_address(node: Node, order: Order) -> Order:
    """at: the time from which the record of `peer` names `address`, also for its own LAN."""
    peer = PeerId(order["peer"])
    while True:
        record = node.directory.view().get(peer)
        if record is not None and order["address"] in (*record.addresses, *record.lan):
            return {"at": time.time()}
        await trio.sleep(LOOK_SECONDS)


async def until_usable(node: Node, order: Order) -> Order:
    """at: the time of the first connection to a peer of this name that worked; tries: up to then."""
    for number in range(1, sys.maxsize):
        found = [each for each in node.directory.view().records() if each.name == order["name"]]
        for record in found:
            try:
                await (await node.open_stream(record.peer, ECHO)).reset()
            except PeerFault:
                continue
            return {"at": time.time(), "tries": number, "peer": record.peer}
        await trio.sleep(LOOK_SECONDS)
    return {"at": math.inf}


ORDERS: Mapping[str, Callable[[Node, Order], Awaitable[Order]]] = {
    each.__name__: each
    for each in (
        connect,
        through,
        way,
        until_direct,
        echo,
        bulk,
        records,
        relayed,
        until_reach,
        until_relays,
        until_address,
        until_usable,
    )
}


def main() -> None:
    """Flags to `serve_lines`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--listen", nargs="*", default=["/ip4/0.0.0.0/tcp/31330"])
    parser.add_argument("--swarm-key", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--relay-mbit", type=int, help="of all circuits together")
    parser.add_argument("--no-relay", action="store_true")
    parser.add_argument("--port-mapping", action="store_true")
    flags = parser.parse_args()
    limits = Limits()
    if flags.relay_mbit is not None:
        limits = replace(limits, relay_bytes_per_second=flags.relay_mbit * 125_000)
    config = NetworkConfig(
        tuple(flags.peers),
        flags.swarm_key,
        listen=tuple(flags.listen),
        name=flags.name,
        limits=limits,
        relay=not flags.no_relay,
        patience_seconds=SECONDS,  # many peers start at once
        port_mapping=flags.port_mapping,
    )
    trio.run(serve_lines, config)


if __name__ == "__main__":
    main()
