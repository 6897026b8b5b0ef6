"""Every knob of a node, with its unit and its default, and the error for the operator.

Built in `node/__main__.py` from the command line; below it nobody reads flags or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tensor_codec.limits import Limits

VERSION = version("raceme")
DEFAULT_LISTEN = "/ip4/127.0.0.1/tcp/0"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class ConfigError(Exception):
    """The operator must fix something: one line that says what was found and what is allowed."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """How a process takes part in the network.

    peers: multiaddrs with /p2p/ID of nodes of the swarm; empty founds a new swarm.
    """

    peers: tuple[str, ...] = ()
    swarm_key: Path | None = None
    identity: Path | None = None  # a new identity for this run where None
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    announce: tuple[str, ...] = ()  # what others are told, where it differs from `listen`
    name: str = ""
    patience_seconds: float = 0.0  # for peers that do not answer yet: they may be starting too
    limits: Limits = field(default_factory=Limits)
    ready_file: Path | None = None


@dataclass(frozen=True, slots=True)
class BalanceConfig:
    """When a node moves to other blocks, and where.

    quality: nobody moves while the swarm can do this share of what its servers could do at best; 0: only
    to blocks that nobody serves.  min_replicas: servers that each block should have, where that costs
    no speed.  seconds: between looks for a better place, on average.
    """

    quality: float = 0.99
    min_replicas: int = 2
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A serving node.

    blocks: the span [start, stop) to serve; num_blocks: or how many, placed where the swarm needs
    them most; neither: as many as fit.  threads: of torch, None for the cores divided by the
    servers on this machine.  cache_tokens: None for what fits.  journal_tokens: whose outputs are kept
    for replays; None for as many as the caches hold.  balance: unless blocks are pinned.
    """

    network: NetworkConfig
    model: str | None = None  # the built-in one where None
    blocks: tuple[int, int] | None = None
    num_blocks: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None  # int8 on CUDA, none elsewhere
    threads: int | None = None
    cache_tokens: int | None = None
    journal_tokens: int | None = None
    balance: BalanceConfig = field(default_factory=BalanceConfig)
