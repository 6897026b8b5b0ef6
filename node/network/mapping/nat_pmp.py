"""NAT-PMP (RFC 6886): two packets over UDP to the router's port 5351, and its answers.

    question of the address     version 0, opcode 0                                           2 bytes
    its answer                  version 0, opcode 128, result, seconds since start, IPv4     12 bytes
    question of a port          version 0, opcode 2, 0, inner port, outer port, lifetime     12 bytes
    its answer                  version 0, opcode 130, result, seconds since start,
                                inner port, outer port, lifetime                             16 bytes

Lifetime 0 deletes.  The router knows this machine by the packet's source address.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable
from typing import TypeVar

import trio

from node.network.mapping.default_route import is_offline, read_default_gateway
from node.network.mapping.plan import NO_ROUTER, Ask, Forwarding, MappingError

PORT = 5351
TRIES_SECONDS = (0.25, 0.5, 1.0)  # RFC 6886 doubles nine times, up to 64 s: a router on a LAN needs 1 ms
_MAP_TCP, _ANSWER = 2, 128
_MAX_ANSWER_BYTES = 64  # answers have 12 or 16
_ADDRESS_ANSWER, _MAP, _MAP_ANSWER = (
    struct.Struct(">BBHI4s"),
    struct.Struct(">BBHHHI"),
    struct.Struct(">BBHIHHI"),
)
_RESULTS = {
    1: "speaks another version",
    2: "does not allow it",
    3: "has no address on its outer side",
    4: "has no port left",
    5: "does not know the request",
}

T = TypeVar("T")


def address_request() -> bytes:
    """The question for the router's own address."""
    return bytes(2)


def map_request(port: int, outside_port: int, lease_seconds: int) -> bytes:
    """The question for a TCP port.  lease_seconds: 0, with outside_port 0, deletes."""
    return _MAP.pack(0, _MAP_TCP, 0, port, outside_port, lease_seconds)


def read_address(answer: bytes) -> str | None:
    """The router's own IPv4 address; None for bytes that answer another question.  Raises MappingError."""
    if not _answers(answer, 0, _ADDRESS_ANSWER.size):
        return None
    return str(ipaddress.IPv4Address(_ADDRESS_ANSWER.unpack(answer)[4]))


def read_mapping(answer: bytes, port: int) -> tuple[int, int] | None:
    """The outer port and its lifetime in seconds; None for bytes that answer another question.

    Raises MappingError.
    """
    if not _answers(answer, _MAP_TCP, _MAP_ANSWER.size):
        return None
    _version, _opcode, _result, _since, inner, outer, lifetime = _MAP_ANSWER.unpack(answer)
    return (outer, lifetime) if inner == port else None


def _answers(answer: bytes, opcode: int, size: int) -> bool:
    """Whether these are the whole answer to a request.  Raises MappingError where the router says no.

    A refusal may be shorter than an answer (RFC 6886, section 3.5).
    """
    if len(answer) < 4 or answer[0] != 0 or answer[1] != _ANSWER + opcode:
        return False
    if (result := int.from_bytes(answer[2:4], "big")) != 0:
        raise MappingError(f"the router {_RESULTS.get(result, f'answers with error {result}')}")
    return len(answer) == size


class NatPmp:
    """Asks this machine's router.

    find_gateway: its IPv4 address; None where there is none.
    """

    def __init__(
        self, find_gateway: Callable[[], str | None] = read_default_gateway, *, port: int = PORT
    ) -> None:
        self._find_gateway = find_gateway
        self._port = port

    async def forward(self, ask: Ask) -> Forwarding:
        """Have a port forwarded.  Raises MappingError."""
        with self._socket() as sock:
            await self._connect(sock)
            own = sock.getsockname()[0]
            if own not in ask.hosts:
                raise MappingError(f"the way to the router begins at {own}, where this node does not listen")
            host = await _exchange(sock, address_request(), read_address)
            request = map_request(ask.port, ask.outside_port, ask.lease_seconds)
            outside, lifetime = await _exchange(sock, request, lambda answer: read_mapping(answer, ask.port))
        if not (outside and lifetime):
            raise MappingError(f"the router gave port {outside} for {lifetime} s, which is no forwarding")
        return Forwarding("nat-pmp", ask.port, host, outside, lifetime)

    async def release(self, forwarding: Forwarding) -> None:
        """Have a port forgotten.  Raises MappingError."""
        port = forwarding.port
        with self._socket() as sock:
            await self._connect(sock)
            await _exchange(sock, map_request(port, 0, 0), lambda answer: read_mapping(answer, port))

    def _socket(self) -> trio.socket.SocketType:
        return trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    async def _connect(self, sock: trio.socket.SocketType) -> None:
        """Only the router's packets arrive at a connected socket.  Raises MappingError."""
        gateway = self._find_gateway()
        if gateway is None:
            raise MappingError(NO_ROUTER if is_offline() else "the default route leads to no router")
        try:
            await sock.connect((gateway, self._port))
        except OSError as error:
            raise MappingError(f"the router {gateway} cannot be reached: {error.strerror or error}") from None


async def _exchange(sock: trio.socket.SocketType, request: bytes, read: Callable[[bytes], T | None]) -> T:
    """Send a request until its answer comes.  Raises MappingError."""
    try:
        for seconds in TRIES_SECONDS:
            await sock.send(request)
            with trio.move_on_after(seconds):
                while True:
                    found = read(await sock.recv(_MAX_ANSWER_BYTES))
                    if found is not None:
                        return found
    except OSError as error:  # the router refuses the port: ICMP
        raise MappingError(f"the router speaks no NAT-PMP: {error.strerror or error}") from None
    raise MappingError(f"the router speaks no NAT-PMP: no answer within {sum(TRIES_SECONDS):g} s")
