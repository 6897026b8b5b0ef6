"""The router of this machine: where packets for the rest of the world go, by Linux's routing table."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

_ROUTES = Path("/proc/net/route")
_UP, _GATEWAY = 0x1, 0x2  # flags of a route (linux/route.h)


def read_default_gateway() -> str | None:
    """The IPv4 address of the router; None where this machine has none, or no table to read."""
    with contextlib.suppress(OSError):
        return default_gateway(_ROUTES.read_text())
    return None


def is_offline() -> bool:
    """Whether this machine has a table, and no default route in it."""
    with contextlib.suppress(OSError):
        return not default_routes(_ROUTES.read_text())
    return False


def default_gateway(table: str) -> str | None:
    """The gateway of the default route with the least metric in a text of /proc/net/route."""
    found = [(metric, host) for metric, host in default_routes(table) if host is not None]
    return min(found, default=(0, None))[1]


def default_routes(table: str) -> list[tuple[int, str | None]]:
    """The metric and the gateway of each default route; None for one that leads to a device alone.

    Columns: interface, destination, gateway, flags, reference count, use, metric, mask, ...  Addresses are
    hexadecimal, in the byte order of the machine: little endian on every machine that we run on.
    """
    found: list[tuple[int, str | None]] = []
    for line in table.splitlines()[1:]:
        with contextlib.suppress(ValueError, IndexError, OverflowError):
            columns = line.split()
            destination, gateway, flags = (int(columns[number], 16) for number in (1, 2, 3))
            if (destination, int(columns[7], 16)) == (0, 0) and flags & _UP:
                host = str(ipaddress.IPv4Address(gateway.to_bytes(4, "little")))
                found.append((int(columns[6]), host if flags & _GATEWAY else None))
    return found
