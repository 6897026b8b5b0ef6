"""Every setting of a client, with its unit and its default, and the checks of a caller's arguments."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.config import DTYPE_CHOICES, ConfigError, config_errors
from node.devices import devices_named
from node.runtime import values
from routing.chains.alternatives import Constraints
from tensor_codec.limits import Limits, limits_with
from tensor_codec.messages.contract import CODEC_CHOICES

SWARM_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class EndsConfig:
    """Where embedding, norm and head compute.

    device: "auto" is the fastest that is there; of a list, as nodes take it, the first.
    dtype: "auto" is the smaller one in which a GPU computes, and float32 on the CPU.
    """

    device: str = "cpu"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The settings of joining, and the times that a client waits.

    model: a folder, a hub id, or a built-in name; None for the default.
    peers: multiaddrs with /p2p/ID of nodes of the swarm.
    wait_seconds: for a chain to come up.  step_seconds: for one step; one request of `forward` and
    `backward` at one hop may take three times as long.  give_up_seconds: for one token, or one hop's
    part of a request, with new chains and replays.
    codec: of hidden states on the wire: "auto" or "exact" (nothing is lost), "fast" (prompts in int8o, which
    loses a little, over links that are slow, and tokens over very slow ones), "fp32" or "bf16".
    ends: where embedding, norm and head compute, which are the client's part.
    constraints: the servers that may be used, and their number in one chain.
    max_disk_bytes: of all models in the cache; those unused for longest make room.
    limits: max_session_tokens bounds the sessions of this client; None: the servers' own bound holds.
    standby: every hop of a session gets a warm standby, where another peer serves its blocks.
    monitor: ping more servers from the start, for pages that show who answers; else from the first use of
    `Swarm.liveness` or `Swarm.events` on.
    """

    peers: tuple[str, ...]
    model: str | None = None
    swarm_key: Path | bytes | None = None
    identity: Path | None = None
    cache_dir: Path | None = None
    max_disk_bytes: int | None = None
    threads: int | None = None
    wait_seconds: float = 30.0
    step_seconds: float = 30.0
    give_up_seconds: float = 120.0
    codec: str = "auto"
    ends: EndsConfig = field(default_factory=EndsConfig)
    constraints: Constraints = field(default_factory=Constraints)
    limits: Limits = field(default_factory=Limits)
    monitor: bool = False
    standby: bool = False


def client_config(
    model: str | os.PathLike[str] | None = None,
    *,
    peers: str | Iterable[str],
    swarm_key: str | os.PathLike[str] | bytes | None = None,
    identity: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_disk_bytes: int | None = None,
    threads: int | None = None,
    wait_seconds: float = 30.0,
    step_seconds: float = 30.0,
    give_up_seconds: float = 120.0,
    codec: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    constraints: Constraints | None = None,
    max_session_tokens: int | None = None,
    max_step_tokens: int | None = None,
    max_frame_bytes: int | None = None,
    monitor: bool = False,
    standby: bool = False,
) -> ClientConfig:
    """The arguments of `client.connect` and `client.connect_sync`, which explain them, as a checked value.

    Raises ConfigError for a value that cannot be: a bad address, a number out of range, constraints that no
    chain can meet.
    """
    with config_errors():
        config = ClientConfig(
            peers=values.texts("peers", peers, "multiaddrs"),
            model=None if model is None else str(values.path("model", model)),
            swarm_key=None if swarm_key is None else _key("swarm_key", swarm_key),
            identity=None if identity is None else values.path("identity", identity),
            cache_dir=None if cache_dir is None else values.path("cache_dir", cache_dir),
            max_disk_bytes=None
            if max_disk_bytes is None
            else values.whole("max_disk_bytes", max_disk_bytes, 1, values.MAX_BYTES),
            threads=None if threads is None else values.whole("threads", threads, 1, values.MAX_THREADS),
            wait_seconds=values.seconds("wait_seconds", wait_seconds),
            step_seconds=values.seconds("step_seconds", step_seconds, above=True),
            give_up_seconds=values.seconds("give_up_seconds", give_up_seconds, above=True),
            codec=codec,
            ends=EndsConfig(devices_named(device)[0], _dtype(dtype)),
            constraints=Constraints() if constraints is None else constraints,
            limits=limits_with(
                max_session_tokens=_tokens("max_session_tokens", max_session_tokens),
                max_step_tokens=_tokens("max_step_tokens", max_step_tokens),
                max_frame_bytes=_tokens("max_frame_bytes", max_frame_bytes),
            ),
            monitor=_flag("monitor", monitor),
            standby=_flag("standby", standby),
        )
    check(config)
    return config


def _key(name: str, value: Any) -> Path | bytes:  # Any: to be checked
    """A key's file, or its bytes.  Raises ValueError."""
    if not isinstance(value, bytes | bytearray | memoryview):
        return values.path(name, value)
    if len(value) != SWARM_KEY_BYTES:
        raise ValueError(f"{name} has {len(value)} bytes, a key of {SWARM_KEY_BYTES} or a path is needed")
    return bytes(value)


def _tokens(name: str, value: Any) -> int | None:  # Any: to be checked
    """None or a whole number.  Raises ValueError."""
    return None if value is None else values.whole(name, value)


def _dtype(value: Any) -> str:  # Any: to be checked
    """A dtype's name.  Raises ValueError."""
    if not isinstance(value, str) or value not in DTYPE_CHOICES:
        raise ValueError(f"dtype is {values.shown(value)}, one of {', '.join(DTYPE_CHOICES)} is allowed")
    return value


def _flag(name: str, value: Any) -> bool:  # Any: to be checked
    """Raises ValueError for another value than True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {values.shown(value)}, True or False is needed")
    return value


def check(config: ClientConfig) -> None:
    """Raise ConfigError for addresses, a codec or constraints that cannot be."""
    from node.network.addresses import bootstrap_peers

    if not config.peers:
        raise ConfigError("a client needs the address of at least one node of the swarm (--peers)")
    bootstrap_peers(config.peers)
    if config.codec not in CODEC_CHOICES:
        allowed = ", ".join(CODEC_CHOICES)
        raise ConfigError(f"the codec is {values.shown(config.codec)}, one of {allowed} is allowed")
    constraints: object = config.constraints
    if not isinstance(constraints, Constraints):
        found = values.shown(constraints)
        raise ConfigError(f"constraints is {found}, client.Constraints(...) is needed")
    try:
        constraints.check()
    except ValueError as error:
        raise ConfigError(f"constraints: {error}") from None
