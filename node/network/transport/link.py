"""The lowest layer: one TCP socket, read and written with the least overhead that trio allows.

`trio.SocketStream` passes three checkpoints and a lock per call.  Here a read is one wait and one
`recv_into`, and a write that the kernel takes at once is one system call without any wait.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Protocol

import trio

from node.network.transport.congestion import use_for_distance
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import KIB


class Link(Protocol):
    """A byte stream with a write that does not wait.  Used by one reader and one writer."""

    @property
    def remote(self) -> tuple[str, int] | None:
        """Address and port of the other end; None without them."""

    @property
    def relayed_by(self) -> PeerId | None:
        """The relay that carries the bytes; None for a direct way."""

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes and put them into the buffer; their number, 0 at the end.  Raises PeerGone."""

    def send_now(self, data: memoryview) -> int:
        """The number of these bytes that the kernel took without waiting.  Raises PeerGone."""

    async def send(self, data: memoryview) -> None:
        """Send all bytes; waits without a bound.  Raises PeerGone."""

    def close(self) -> None:
        """Close at once; every waiter gets PeerGone.  Twice does no harm."""


class SocketLink:
    """A link over a connected TCP socket; nobody else uses the socket."""

    relayed_by: PeerId | None = None

    def __init__(self, stream: trio.SocketStream | socket.socket, user_timeout_seconds: float) -> None:
        """Take the socket out of a trio stream, which is of no use afterwards."""
        if isinstance(stream, socket.socket):
            self._socket = stream
        else:
            self._socket = socket.socket(fileno=stream.socket.detach())
        with contextlib.suppress(OSError):  # gone already: the first read will raise
            _tune(self._socket, user_timeout_seconds)
        try:
            name = self._socket.getpeername()
            self.remote: tuple[str, int] | None = (str(name[0]), int(name[1]))
            self.local_port = int(self._socket.getsockname()[1])
        except OSError:
            self.remote, self.local_port = None, 0
        self._socket.setblocking(False)
        self._descriptor = self._socket.fileno()
        self._closed = False

    async def readable(self) -> None:
        """Wait until bytes or the end have come; costs no buffer.  Raises PeerGone."""
        try:
            if self._closed:
                raise PeerGone("the connection was closed on this side")
            await trio.lowlevel.wait_readable(self._descriptor)
        except (OSError, trio.ClosedResourceError) as error:
            raise PeerGone(self._reason(error)) from None

    @property
    def has_ended(self) -> bool:
        """Whether no bytes wait and none will come."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def receive_into(self, buffer: memoryview) -> int:
        """See Link."""
        while True:
            try:
                if self._closed:
                    raise PeerGone("the connection was closed on this side")
                await trio.lowlevel.wait_readable(self._descriptor)
                return self._socket.recv_into(buffer)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError) as error:
                raise PeerGone(self._reason(error)) from None

    def send_now(self, data: memoryview) -> int:
        """See Link."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise PeerGone(self._reason(error)) from None

    async def send(self, data: memoryview) -> None:
        """See Link."""
        while data := data[self.send_now(data) :]:
            try:
                await trio.lowlevel.wait_writable(self._descriptor)
            except (OSError, trio.ClosedResourceError) as error:
                raise PeerGone(self._reason(error)) from None

    def close(self) -> None:
        """See Link."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._descriptor)
            self._socket.close()

    def _reason(self, error: Exception) -> str:
        if self._closed or isinstance(error, trio.ClosedResourceError):
            return "the connection was closed on this side"
        return f"the connection broke: {getattr(error, 'strerror', None) or error}"


def _tune(sock: socket.socket, user_timeout_seconds: float) -> None:
    """Small messages at once, and a dead peer noticed in seconds where the kernel would take 15 minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, round(user_timeout_seconds))
    # Names that not every system has, each with its value
    for name, value in (
        ("TCP_USER_TIMEOUT", seconds * 1000),
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", max(1, seconds // 3)),
        ("TCP_KEEPCNT", 3),
        # bytes that the kernel holds unsent delay every later small message
        ("TCP_NOTSENT_LOWAT", 128 * KIB),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    use_for_distance(sock)
