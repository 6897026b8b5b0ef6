"""A network of namespaces joined by a bridge, in which a link can be taken down without a reset.

Linux, as root.  The process that builds it must be alone in a network and a mount namespace of its
own (`command_inside`): everything is gone when it and its children have ended.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

BRIDGE, NETWORK = "raceme0", "10.77.0"
MOUNT = Path("/run/netns")  # where `ip netns` looks for names
_NEW_NET = 0x40000000  # CLONE_NEWNET of setns(2)


def why_not() -> str | None:
    """The reason why namespaces cannot be made here, in a few words; None where they can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    named = f"mkdir -p {MOUNT} && mount -t tmpfs tmpfs {MOUNT} && ip netns add n0"
    script = f"{named} && ip link add name {BRIDGE} type bridge"
    try:
        done = subprocess.run(
            ["unshare", "-nm", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError as missing:
        return f"there is no {missing.filename} here"
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None


def command_inside(module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a Python module in namespaces of its own."""
    return ["unshare", "-nm", sys.executable, "-m", module, *arguments]


def enter(namespace: str) -> None:
    """Move the calling thread into a namespace, as `ip netns exec` does.  Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    with open(MOUNT / namespace) as file:
        if libc.setns(file.fileno(), _NEW_NET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


@dataclass(frozen=True, slots=True)
class Link:
    """One namespace and its way to the bridge."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before a command, to run it there."""
        return ("ip", "netns", "exec", self.namespace)

    def down(self) -> None:
        """Cut the link: from here on no packet passes, and no connection is reset."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def up(self) -> None:
        """Connect the link again."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")


@dataclass(slots=True)
class Network:
    """The bridge; the process that made it is on it, at `address`."""

    links: list[Link] = field(default_factory=list)
    address: str = f"{NETWORK}.1"

    def __post_init__(self) -> None:
        MOUNT.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(MOUNT)], check=True)
        _ip("link", "set", "lo", "up")
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")

    def add(self) -> Link:
        """A new namespace on the bridge."""
        number = len(self.links) + 2
        link = Link(f"n{number}", f"{NETWORK}.{number}")
        _ip("netns", "add", link.namespace)
        _ip("link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", link.namespace)
        _ip("link", "set", f"v{number}", "master", BRIDGE, "up")
        _ip("-n", link.namespace, "addr", "add", f"{link.address}/24", "dev", "eth0")
        _ip("-n", link.namespace, "link", "set", "eth0", "up")
        _ip("-n", link.namespace, "link", "set", "lo", "up")
        self.links.append(link)
        return link


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
