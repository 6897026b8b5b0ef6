"""The addresses of a run: all on the loopback, or public in form in a network namespace without a way out.

A node has other rules for peers of its own machine than for an address of the internet.  In a namespace of
its own the loopback interface takes any address, so the second case can be tried without a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Places:
    """node: listened on.  honest, attacker: where they come from.  third: nobody knows why it is dialled."""

    node: str
    honest: str
    attacker: tuple[str, ...]
    third: str


LOCAL = Places("127.0.0.1", "127.0.0.1", ("127.0.0.66",), "127.0.0.99")
# Of the networks for documentation (RFC 5737), each another network
PUBLIC = Places("192.0.2.1", "203.0.113.5", ("198.51.100.66",), "203.0.113.99")


def command_inside(module: str, words: Sequence[str]) -> list[str]:
    """The command that runs a module in a network namespace of its own, as root or as anybody."""
    return [*inside(), sys.executable, "-m", module, *words]


def inside() -> list[str]:
    """The words before a command, to run it in a network namespace of its own."""
    return ["unshare", "-n" if os.geteuid() == 0 else "-rn"]


def can_go_inside() -> bool:
    """Whether a network namespace can be made here (Linux, as root or with user namespaces)."""
    try:
        found = subprocess.run([*inside(), "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    except OSError:
        return False
    return found.returncode == 0


def take_public_places() -> None:
    """Give the loopback interface of this namespace all public places.  Raises CalledProcessError."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in (PUBLIC.node, PUBLIC.honest, PUBLIC.third, *PUBLIC.attacker):
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    # Who connects to the node without a choice of its own comes from the honest address.
    route = ["local", PUBLIC.node, "dev", "lo", "table", "local", "src", PUBLIC.honest]
    subprocess.run(["ip", "route", "replace", *route], check=True)
