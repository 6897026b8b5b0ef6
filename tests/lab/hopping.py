"""Circuit v2 by hand, against a relay on another host: libp2p's own messages, and nothing of our relaying.

    python -m tests.lab.hopping RELAY_MULTIADDR        orders on standard input, answers on standard output

Orders: {"reserve": CLAIMED or null}, {"connect": PEER}, {"flood": MIB} into the last circuit that was opened.
Every circuit that the relay brings is accepted, and nothing is read of it.
"""

from __future__ import annotations

import json
import sys

import base58
import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage

from node.network.host import Host, open_host
from node.network.transport.connection import MuxedStream
from node.network.transport.identity import load_or_create_identity
from routing.names import PeerId

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
LISTEN = "/ip4/0.0.0.0/tcp/31330"
SECONDS = 10.0
PIECE = bytes(64 * 1024)


async def serve_lines(multiaddr: str) -> None:
    address, _, relay = multiaddr.partition("/p2p/")
    async with open_host(identity=load_or_create_identity(None), listen=[LISTEN]) as host:
        host.handle_bytes(STOP, accept)
        await host.connect(PeerId(relay), [address], seconds=SECONDS)
        say({"peer": host.peer_id})
        circuits: list[MuxedStream] = []
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = json.loads(line)
            if "flood" in order:
                say(await flood(circuits[-1], order["flood"]))
                continue
            kind = HopMessage.RESERVE if "reserve" in order else HopMessage.CONNECT
            stream, status = await asked(
                host, PeerId(relay), kind, order.get("reserve", order.get("connect"))
            )
            circuits.append(stream)
            say({"status": status})


async def accept(stream: MuxedStream, peer: PeerId, prefix: str) -> None:
    await undelimited(stream)
    answer = StopMessage(type=StopMessage.STATUS, status=Status.OK)
    await stream.send_all(delimited(answer.SerializeToString()))
    await trio.sleep_forever()


async def asked(host: Host, relay: PeerId, kind, peer) -> tuple[MuxedStream, str]:
    message = HopMessage(type=kind)
    if peer is not None:
        message.peer.id = base58.b58decode(peer)
    stream = await host.open_bytes(relay, (), HOP, seconds=SECONDS)
    with trio.fail_after(SECONDS):
        await stream.send_all(delimited(message.SerializeToString()))
        answer = HopMessage()
        answer.ParseFromString(await undelimited(stream))
    return stream, Status.Name(answer.status)


async def flood(stream: MuxedStream, mib: int):
    """sent: bytes that were taken until nothing moved for a second."""
    sent = 0
    for _ in range(mib * 16):
        with trio.move_on_after(1.0) as waiting:
            await stream.send_all(PIECE)
        if waiting.cancelled_caught:
            break
        sent += len(PIECE)
    return {"sent": sent}


def delimited(data: bytes) -> bytes:
    size, head = len(data), b""
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + data


async def undelimited(stream: MuxedStream) -> bytes:
    size = shift = 0
    while True:
        (byte,) = await stream.receive_some(1)
        size, shift = size | (byte & 127) << shift, shift + 7
        if byte < 128:
            break
    data = b""
    while len(data) < size:
        data += await stream.receive_some(size - len(data))
    return data


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    trio.run(serve_lines, sys.argv[1])
