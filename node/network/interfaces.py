"""This machine's network interfaces: from psutil, and on Linux the kernel's facts on bridges and IPv6."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from node.network.addresses import Interface, InterfaceAddress, is_inner_interface

_SYSTEM = Path("/sys/class/net")
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
# Flags of an IPv6 address (linux/if_addr.h)
_TEMPORARY, _DUPLICATE, _DEPRECATED, _TENTATIVE = 0x01, 0x08, 0x20, 0x40


def read_interfaces() -> list[Interface]:
    """All interfaces, with their IP addresses.  An unknown fact of an interface counts as ordinary."""
    stats: Mapping[str, object] = {}
    with contextlib.suppress(OSError):
        stats = psutil.net_if_stats()
    flags = _ipv6_flags()
    return [
        Interface(
            name,
            tuple(
                _address(each.address, flags)
                for each in addresses
                # link-local IPv6 addresses have their interface's name in them, which is of no use elsewhere
                if each.family in (socket.AF_INET, socket.AF_INET6) and "%" not in each.address
            ),
            is_up=getattr(stats.get(name), "isup", True),
            is_inner=is_inner_interface(name, _bridge_ports(name)),
        )
        for name, addresses in psutil.net_if_addrs().items()
    ]


def _address(host: str, flags: Mapping[str, int]) -> InterfaceAddress:
    flag = flags.get(host, 0)
    usable = not flag & (_DUPLICATE | _DEPRECATED | _TENTATIVE)
    return InterfaceAddress(host, temporary=bool(flag & _TEMPORARY), usable=usable)


def _ipv6_flags() -> dict[str, int]:
    """The flags of each IPv6 address that the kernel knows."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, _index, _prefix, _scope, flag, *_name = line.split()
            found[str(ipaddress.IPv6Address(int(digits, 16)))] = int(flag, 16)
    return found


def _bridge_ports(name: str) -> list[bool] | None:
    """For each port of a bridge, whether it leads out of this machine; None without a bridge."""
    folder = _SYSTEM / name
    if not (folder / "bridge").is_dir():
        return None
    with contextlib.suppress(OSError):
        return [_leads_out(_SYSTEM / port.name) for port in (folder / "brif").iterdir()]
    return []


def _leads_out(interface: Path) -> bool:
    """Whether an interface is hardware or made of hardware."""
    kinds = {f"DEVTYPE={kind}" for kind in ("bond", "vlan", "wlan")}
    is_team = interface.name.startswith("team")
    with contextlib.suppress(OSError):
        uevent = (interface / "uevent").read_text().split()
        return is_team or (interface / "device").exists() or not kinds.isdisjoint(uevent)
    return is_team
