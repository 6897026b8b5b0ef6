"""A relay of py-libp2p alone, with nothing of ours, on a host of a lab: says its multiaddr."""

from __future__ import annotations

import json
import sys

import trio
from libp2p.relay.circuit_v2.config import RelayLimits
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from benchmarks.network.wire import stock_host


async def relay(ip4: str) -> None:
    host = stock_host()
    address = f"/ip4/{ip4}/tcp/4001"
    async with host.run([Multiaddr(address)]):
        limits = RelayLimits(duration=3600, data=2**30, max_circuit_conns=64, max_reservations=64)
        async with background_trio_service(CircuitV2Protocol(host, limits, allow_hop=True)):
            print(json.dumps(f"{address}/p2p/{host.get_id().to_base58()}"), flush=True)  # noqa: T201
            await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(relay, sys.argv[1])
