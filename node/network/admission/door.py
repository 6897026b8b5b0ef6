"""Takes sockets from a listener, many at once, and closes those quickly that get no handshake.

The kernel's queue of fresh connections is one for all peers.  A newcomer waits behind a flood only for as
long as it takes to close the flood's sockets, which is some 30 microseconds each.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Callable

import trio

BACKLOG = 1024  # a flood of some thousand sockets a second, while the loop is busy for a quarter of a second
_AT_ONCE = 64  # sockets, before other tasks have a turn
_ENTER_AT_ONCE = 8  # of these; to begin a handshake costs ten times as much as to close a socket
_PAUSE_SECONDS = 0.005  # in a flood: more sockets for each turn
_NO_MEANS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_NO_MEANS_SECONDS = 0.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER without time: closing sends a reset and leaves nothing behind

logger = logging.getLogger(__name__)


async def keep_door(
    listener: socket.socket, may_enter: Callable[[str], bool], enter: Callable[[socket.socket], object]
) -> None:
    """Accept sockets until cancelled.

    listener: does not block.  may_enter: whether an address may bring one more socket.
    """
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            refused = _take_some(listener, may_enter, enter)
        except OSError as error:
            if error.errno not in _NO_MEANS:
                raise
            logger.warning("no connection can be accepted: %s", error.strerror)
            await trio.sleep(_NO_MEANS_SECONDS)
        else:
            if refused:
                await trio.sleep(_PAUSE_SECONDS)


def _take_some(
    listener: socket.socket, may_enter: Callable[[str], bool], enter: Callable[[socket.socket], object]
) -> int:
    """Take the sockets that wait; the number of those that were refused."""
    refused = entered = 0
    while refused < _AT_ONCE and entered < _ENTER_AT_ONCE:
        try:
            accepted, address = listener.accept()
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno in _NO_MEANS or error.errno in (errno.EBADF, errno.EINVAL):
                raise
            continue  # this one ended before it was accepted
        if may_enter(str(address[0])):
            entered += 1
            enter(accepted)
        else:
            refused += 1
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            accepted.close()
    return refused
