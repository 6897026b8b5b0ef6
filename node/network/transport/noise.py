"""A secured connection: libp2p's Noise handshake, then nothing per message but the cipher.

The handshake (Noise XX with signed payloads) is py-libp2p's.  Its session reads every message in two
short reads through four objects; here one read takes all bytes that the kernel has and opens every whole
message in them.  The bytes on the wire are equal: 2 bytes of length, then at most 65,535 of ciphertext.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.patterns import PatternXX

from node.network.transport.link import Link
from node.network.transport.multistream import Dialogue
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import KIB

if TYPE_CHECKING:
    from node.network.transport.identity import Identity

PROTOCOL = "/noise"
# Offered in place of PROTOCOL with a swarm key.  A peer without a key does not know this name, so it is
# refused in its first packet.
PRIVATE_PROTOCOL = "/raceme/noise/1"
MAX_PLAINTEXT = 65_535 - 16
_BUFFER_BYTES = 192 * KIB  # one read of 128 KiB after all but the end of a message
LEAST_TIMED_BYTES = 8 * KIB  # fewer come in a burst or two
_LENGTH = struct.Struct(">H")
_NONCE = struct.Struct("<4xQ")


class SecureChannel:
    """Bytes to and from one authenticated peer, over a link.

    remote: its peer id.  handshake_hash: equal at both ends and nowhere else.
    round_trip_seconds: from a message of the handshake to its answer, which the peer had to compute.
    speed: bytes per second of the way here, by the last long message that came in pieces; 0: unknown.
    """

    def __init__(
        self,
        link: Link,
        buffer: ReadBuffer,
        session: Any,
        initiator: bool,
        round_trip_seconds: float | None = None,
    ) -> None:
        # `session` is py-libp2p's, untyped: we take the peer's id and the two keys out of it
        noise = session.conn.noise_state.noise_protocol
        self.link = link
        self.initiator = initiator
        self.round_trip_seconds = round_trip_seconds
        self.remote_id: ID = session.remote_peer
        self.remote = PeerId(session.remote_peer.to_base58())
        self.handshake_hash = bytes(noise.handshake_hash)
        self._buffer = buffer
        self._seal = ChaCha20Poly1305(bytes(noise.cipher_state_encrypt.k)).encrypt
        self._open = ChaCha20Poly1305(bytes(noise.cipher_state_decrypt.k)).decrypt
        self.speed = 0
        self._sealed = 0
        self._opened = 0
        self._plain = bytearray()

    async def receive(self) -> bytes:
        """The bytes of one read, at least one message; b"" at the end.

        Raises PeerGone, RemoteProtocolError.
        """
        if self._plain:
            data = bytes(self._plain)
            self._plain.clear()
            return data
        if not (messages := self._messages()):
            if not await self._buffer.fill():
                return self._end()
            if not (messages := self._messages()):  # a message that comes in pieces
                began, before = trio.current_time(), self._buffer.received
                while not (messages := self._messages()):
                    if not await self._buffer.fill():
                        return self._end()
                self.speed = _speed(self._buffer.received - before, trio.current_time() - began) or self.speed
        return messages[0] if len(messages) == 1 else b"".join(messages)

    async def receive_some(self, max_bytes: int) -> bytes:
        """As `receive`, but at most this number of bytes.  For the rest of the handshake."""
        data = await self.receive()
        self._plain += data[max_bytes:]
        return data[:max_bytes]

    def seal(self, data: bytes) -> bytes:
        """The bytes for the wire.  Sealed bytes must be sent completely and in this order."""
        if len(data) <= MAX_PLAINTEXT:
            return self._seal_one(data)
        view = memoryview(data)
        return b"".join(
            self._seal_one(view[i : i + MAX_PLAINTEXT]) for i in range(0, len(data), MAX_PLAINTEXT)
        )

    async def send(self, data: bytes) -> None:
        """Seal and send; waits without a bound.  Raises PeerGone."""
        await self.link.send(memoryview(self.seal(data)))

    def _end(self) -> bytes:
        """Of the bytes.  Raises PeerGone inside a message."""
        if self._buffer.size:
            raise PeerGone("the connection ended inside a message")
        return b""

    def _seal_one(self, data: bytes | memoryview) -> bytes:
        nonce = _NONCE.pack(self._sealed)
        self._sealed += 1
        return _LENGTH.pack(len(data) + 16) + self._seal(nonce, data, None)

    def _messages(self) -> list[bytes]:
        messages = []
        while (message := self._buffer.next_message()) is not None:
            try:
                plain = self._open(_NONCE.pack(self._opened), message, None)
            except (InvalidTag, ValueError):
                raise RemoteProtocolError(
                    "a message that was not sealed with this connection's key"
                ) from None
            finally:
                message.release()
            self._opened += 1
            if plain:
                messages.append(plain)
        return messages


def _speed(size: int, seconds: float) -> int:
    """Bytes per second of a message's bytes after its first ones; 0: too few to say.

    A message goes out at once, and the slowest link of its way stretches it (packet-train dispersion:
    Dovrolis, Ramanathan, Moore, "What do packet dispersion techniques measure?", INFOCOM 2001).
    """
    return int(size / seconds) if size >= LEAST_TIMED_BYTES and seconds > 0 else 0


class ReadBuffer:
    """The bytes that were read from a link and not used yet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._memory = bytearray(_BUFFER_BYTES)
        self._begin = self._end = 0
        self.received = 0  # bytes so far

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._end - self._begin

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end.  Raises PeerGone."""
        size = self.size
        if self._begin:
            self._memory[:size] = self._memory[self._begin : self._end]
            self._begin, self._end = 0, size
        count = await self._link.receive_into(memoryview(self._memory)[size:])
        self._end += count
        self.received += count
        return count > 0

    async def take(self, max_bytes: int) -> bytes:
        """The next bytes, at most this number; b"" at the end.  Raises PeerGone."""
        if not self.size and not await self.fill():
            return b""
        begin = self._begin
        self._begin = min(begin + max_bytes, self._end)
        return bytes(self._memory[begin : self._begin])

    def next_message(self) -> memoryview | None:
        """The next whole length-prefixed message, valid until the next call; release it."""
        if self._end - self._begin < 2:
            return None
        (size,) = _LENGTH.unpack_from(self._memory, self._begin)
        begin = self._begin + 2
        if self._end - begin < size:
            return None
        self._begin = begin + size
        return memoryview(self._memory)[begin : self._begin]


class HandshakeConnection:
    """A link as py-libp2p's handshake wants it: exact reads, and writes held back until a read."""

    def __init__(self, link: Link) -> None:
        self.buffer = ReadBuffer(link)
        self.dialogue = Dialogue(self.buffer.take, self._send)
        # Each message of Noise is computed from the one before, so the last read answers the last write: a
        # round trip.
        self.round_trip_seconds: float | None = None
        self._link = link
        self._sent_at: float | None = None
        self._before_reading: Callable[[], Awaitable[None]] | None = None

    async def _send(self, data: bytes) -> None:
        self._sent_at = trio.current_time()
        await self._link.send(memoryview(data))

    def before_reading(self, action: Callable[[], Awaitable[None]]) -> None:
        """Do this once, at the handshake's first read; its writes go out before that read."""
        self._before_reading = action

    async def read(self, n: int) -> bytes:
        """Exactly n bytes."""
        action, self._before_reading = self._before_reading, None
        if action is not None:
            await action()
        data = await self.dialogue.read(n)
        if self._sent_at is not None:
            self.round_trip_seconds = trio.current_time() - self._sent_at
        return data

    async def write(self, data: bytes) -> None:
        """Send with the next read."""
        await self.dialogue.write(data)

    async def close(self) -> None:
        """Does nothing: the owner of the link closes it."""


class Noise:
    """Makes secured connections for one identity."""

    def __init__(self, identity: Identity) -> None:
        self._identity_key = create_new_key_pair(seed=identity.private_key).private_key
        self._noise_key = create_noise_key_pair().private_key
        self._local = ID.from_base58(identity.peer_id)

    async def secure(self, link: Link, connection: HandshakeConnection, remote: ID | None) -> SecureChannel:
        """Run the handshake: as initiator with `remote`, the peer that must answer; as responder with None.

        Unsent bytes go out with the channel's first bytes at the latest.
        Raises PeerGone, and RemoteProtocolError for every fault of a peer.
        """
        pattern = PatternXX(self._local, self._identity_key, self._noise_key)
        # A ReadWriteCloser in all that the handshake uses of one
        raw = cast(Any, connection)
        try:
            if remote is None:
                session = await pattern.handshake_inbound(raw)
            else:
                session = await pattern.handshake_outbound(raw, remote)
        except PeerFault:
            raise
        # The handshake decodes the peer's bytes with four libraries, each with errors of its own: any error
        # is the peer's fault.
        except Exception as error:
            raise RemoteProtocolError(
                f"the Noise handshake failed: {type(error).__name__} {error}"
            ) from error
        round_trip = connection.round_trip_seconds
        await connection.dialogue.flush()
        return SecureChannel(link, connection.buffer, session, remote is not None, round_trip)
