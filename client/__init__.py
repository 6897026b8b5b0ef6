"""Use a swarm from Python: `async with client.connect(...)`.  Read `client/connect.py` first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.runtime.interrupts import end_at_once_on_interrupt, is_command

if is_command("client"):
    end_at_once_on_interrupt()

from client.api import SwarmLike, SyncSwarm

# The function takes the place of the module of its name, so it cannot wait for __getattr__: an import of
# the module would put that here.  `from client.connect import ...` finds the module.
from client.connect import connect, connect_sync
from client.generation.options import GenerateOptions
from node.config import ConfigError
from routing.chains.alternatives import Constraints
from routing.chains.hops import NoChain
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.messages.info import PeerInfo

if TYPE_CHECKING:
    from client.batch_parts import KeptInputs
    from client.generation.generate import Token

__all__ = [
    "ConfigError",
    "Constraints",
    "GenerateOptions",
    "KeptInputs",
    "NoChain",
    "PeerFault",
    "PeerInfo",
    "Refused",
    "SwarmLike",
    "SyncSwarm",
    "Token",
    "connect",
    "connect_sync",
]


def __getattr__(name: str) -> Any:  # Any: of every type
    """Names whose modules import torch: imported at their first use."""
    if name == "Token":
        from client.generation.generate import Token

        return Token
    if name == "KeptInputs":
        from client.batch_parts import KeptInputs

        return KeptInputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
