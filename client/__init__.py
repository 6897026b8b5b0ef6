"""Use a swarm from Python: `async with client.connect(...)`.  Read `client/connect.py` first."""

from __future__ import annotations

from importlib import import_module
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
    from client.adapters.adapter import Adapter
    from client.adapters.folder import load_adapter, new_adapter, save_adapter
    from client.adapters.trainer import train, train_sync
    from client.batch_parts import KeptInputs
    from client.generation.generate import Token

__all__ = [
    "Adapter",
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
    "load_adapter",
    "new_adapter",
    "save_adapter",
    "train",
    "train_sync",
]

# Names whose modules import torch, which is imported at their first use.
_LATER = {
    "Adapter": "client.adapters.adapter",
    "KeptInputs": "client.batch_parts",
    "Token": "client.generation.generate",
    "load_adapter": "client.adapters.folder",
    "new_adapter": "client.adapters.folder",
    "save_adapter": "client.adapters.folder",
    "train": "client.adapters.trainer",
    "train_sync": "client.adapters.trainer",
}


def __getattr__(name: str) -> Any:  # Any: of every type
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
