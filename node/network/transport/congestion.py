"""TCP's congestion control for distant peers: BBR, where this machine has it (decision 0044).

The usual ones, CUBIC and Reno, forget the rate of a line after a pause of less than a second and begin again
with ten packets (RFC 5681, section 4.1).  A prompt after a silence then needs five round trips more at each
hop.  BBR (Cardwell et al., ACM Queue 14(5), 2016) keeps its estimate, and fills no long queue in a router at
home.  Between near peers the pause costs nothing, and BBR's pacing halves the throughput of a fast network.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from functools import cache
from pathlib import Path

FAR_SECONDS = 0.005  # a round trip; below it five of them are no time, and lines may carry 10 Gbit/s
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")  # loaded: asking loads no module
_BBR = "bbr"
_RTT = struct.Struct("=68xI")  # tcpi_rtt of struct tcp_info (linux/tcp.h), in microseconds

log = logging.getLogger(__name__)


def use_for_distance(sock: socket.socket) -> None:
    """Give the socket of a connection with a long round trip BBR, where this process may.

    The round trip is that of TCP's own handshake.  Any other socket keeps the system's choice.
    Raises OSError where the connection is gone already.
    """
    if has_bbr() and handshake_seconds(sock) >= FAR_SECONDS:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _BBR.encode())


def handshake_seconds(sock: socket.socket) -> float:
    """The round trip of a connected socket as the kernel has measured it; 0.0 where it has not."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT.size)
    return float(_RTT.unpack(info)[0]) / 1e6 if len(info) == _RTT.size else 0.0


@cache
def has_bbr() -> bool:
    """Whether this process may use BBR; asked once, and said in the log."""
    reason = _refusal()
    if reason is None:
        log.debug("distant peers: TCP with BBR")
    else:
        log.debug("distant peers: TCP with the system's congestion control (%s)", reason)
    return reason is None


def _refusal() -> str | None:
    """The reason why there is no BBR; None where there is."""
    if not hasattr(socket, "TCP_CONGESTION") or not hasattr(socket, "TCP_INFO"):
        return "this system offers no choice"
    try:
        available = _AVAILABLE.read_text().split()
    except OSError:
        return "this system offers no choice"
    if _BBR not in available:
        return f"it has {' and '.join(available)}, without bbr"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _BBR.encode())
    except OSError as error:
        allowed = "net.ipv4.tcp_allowed_congestion_control" if error.errno == errno.EPERM else "the kernel"
        return f"{allowed} refuses bbr"
    return None
