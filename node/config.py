"""Every knob of a node, with its unit and its default, and the error for the operator.

Built in `node/__main__.py` from the command line; no module below it reads flags or the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from node.devices import MAX_DEVICES, devices_named
from node.monitor.metrics.address import MetricsAddress
from node.runtime import values
from routing.placement.goals import MIN_REPLICAS, QUALITY
from tensor_codec.blocks import Blocks
from tensor_codec.limits import Limits
from tensor_codec.span_spec import DTYPES, QUANTIZE

VERSION = version("raceme")
DEFAULT_LISTEN = "/ip4/127.0.0.1/tcp/0"
LAN_LISTEN = "/ip4/0.0.0.0/tcp/0"  # with --lan alone
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DTYPE_CHOICES = ("auto", *DTYPES)
LLM_INT8 = "llm_int8"  # int8 rows that bitsandbytes multiplies (arXiv:2208.07339), on CUDA alone
QUANTIZE_CHOICES = (*QUANTIZE, LLM_INT8)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float32")
CODECS_OF_A_NODE = ("auto", "exact")


class ConfigError(Exception):
    """An error that the operator must fix: one line with the found and the allowed value."""


@contextmanager
def config_errors() -> Iterator[None]:
    """Let a ValueError of the block be a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """How a process takes part in the network.

    peers: multiaddrs with /p2p/ID of nodes of the swarm; empty founds a new swarm.
    lan: announce this process in its local network, and join what is there; None: where it listens on more
    than loopback, and there joins only without `peers`.
    Raises ConfigError for a value of another kind.
    """

    peers: tuple[str, ...] = ()
    swarm_key: Path | None = None
    identity: Path | None = None  # a new identity for this run where None
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    announce: tuple[str, ...] = ()  # addresses to announce, where they differ from `listen`
    name: str = ""
    patience_seconds: float = 0.0  # for peers that do not answer yet: they may be starting too
    limits: Limits = field(default_factory=Limits)
    ready_file: Path | None = None
    metrics: str | None = None  # HOST:PORT of /metrics and /health
    metrics_hosts: tuple[str, ...] = ()  # names, besides localhost, under which these may be asked
    require_reach: bool = False  # end where no peer can dial this node, and no relay helps
    port_mapping: bool = False  # have the router forward the ports of listeners beyond loopback
    lan: bool | None = False
    relays: tuple[str, ...] = ()  # multiaddrs of peers that shall relay to this node, whoever they are
    relay: bool = True  # carry circuits for others, where this node can be reached

    def __post_init__(self) -> None:
        with config_errors():
            object.__setattr__(
                self, "metrics_hosts", values.texts("metrics_hosts", self.metrics_hosts, "names")
            )
            if self.metrics is not None:
                MetricsAddress.parse(self.metrics, self.metrics_hosts)
            for name in ("peers", "listen", "announce", "relays"):
                object.__setattr__(self, name, values.texts(name, getattr(self, name), "multiaddrs"))
            for name in ("swarm_key", "identity", "ready_file"):
                if (value := getattr(self, name)) is not None:
                    object.__setattr__(self, name, values.path(name, value))
            values.seconds("patience_seconds", self.patience_seconds)
            if self.lan not in (None, False, True) or self.port_mapping not in (False, True):
                found = f"lan is {values.shown(self.lan)}, port_mapping is {values.shown(self.port_mapping)}"
                raise ValueError(f"{found}: False and True are allowed, and None for lan")
            if not isinstance(self.name, str):
                raise ValueError(f"name is {values.shown(self.name)}, a text is needed")

    @property
    def looks_in_lan(self) -> bool:
        """Whether peers of the local network are joined, where this process is announced there at all."""
        return self.lan is True or (self.lan is None and not self.peers)

    @property
    def metrics_address(self) -> MetricsAddress | None:
        """Where metrics are served; None: nowhere."""
        return None if self.metrics is None else MetricsAddress.parse(self.metrics, self.metrics_hosts)


@dataclass(frozen=True, slots=True)
class BalanceConfig:
    """The rule for a node's moves to other blocks.

    quality: no node moves while the swarm's capacity is this share of its bound; 0: nodes move only to
    blocks without a server.  min_replicas: servers that each block should have, where that costs no
    capacity.
    seconds: between looks for a better place, on average.
    """

    quality: float = QUALITY
    min_replicas: int = MIN_REPLICAS
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A serving node.

    blocks: the blocks to serve, a `Blocks` or any pair (start, stop); num_blocks: their number alone, placed
    where the swarm needs them most; neither: as many as fit.  device: one name, or several
    ("cuda:0,cuda:1") that have the blocks one after the other.  tensor_parallel: the number of devices that
    divide each block among them.  threads: of torch; None: the cores divided by the servers on this machine,
    which come and go.  cache_tokens: None for as many as fit.  kv_cache_dtype: of keys and values, on a CPU;
    "auto": see `cache_dtype_for`.  journal_tokens: of outputs kept for replays; None for as many as the
    caches hold.  codec: "auto": hidden states may lose a little on their way, where a client asks for it and
    a link is slow; "exact": never here.  balance: unless `blocks` is
    given.  adapters: at most four.  Raises ConfigError for a value of another kind or out of range.
    """

    network: NetworkConfig
    model: str | None = None  # the built-in one where None
    blocks: Blocks | None = None
    num_blocks: int | None = None
    device: str = "auto"
    tensor_parallel: int = 1
    dtype: str = "auto"
    quantize: str | None = None  # int8 on CUDA, none elsewhere
    threads: int | None = None
    cache_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    journal_tokens: int | None = None
    codec: str = "auto"
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    vitals_file: Path | None = None  # what the node holds, once a second
    max_disk_bytes: int | None = None  # of all models in the cache
    adapters: tuple[str, ...] = ()  # folders of peft or names of the hub, kept for everybody

    def __post_init__(self) -> None:
        with config_errors():
            object.__setattr__(self, "adapters", values.texts("adapters", self.adapters, "folders or names"))
            if self.model is not None:
                object.__setattr__(self, "model", str(values.path("model", self.model)))
            if self.vitals_file is not None:
                object.__setattr__(self, "vitals_file", values.path("vitals_file", self.vitals_file))
            if self.blocks is not None:
                object.__setattr__(self, "blocks", _blocks(self.blocks))
            for name, least, most in (
                ("num_blocks", 1, values.MAX_TOKENS),
                ("threads", 1, values.MAX_THREADS),
                ("cache_tokens", 1, values.MAX_TOKENS),
                ("journal_tokens", 0, values.MAX_TOKENS),
                ("max_disk_bytes", 1, values.MAX_BYTES),
            ):
                if (value := getattr(self, name)) is not None:
                    object.__setattr__(self, name, values.whole(name, value, least, most))
            self._check_devices()
            for name, known in (
                ("dtype", DTYPE_CHOICES),
                ("quantize", (None, *QUANTIZE_CHOICES)),
                ("kv_cache_dtype", KV_CACHE_DTYPES),
                ("codec", CODECS_OF_A_NODE),
            ):
                if (value := getattr(self, name)) not in known:
                    allowed = ", ".join(each for each in known if each and each != LLM_INT8)
                    also = f" ({LLM_INT8} on CUDA)" if LLM_INT8 in known else ""
                    raise ValueError(f"{name} is {values.shown(value)}, one of {allowed} is allowed{also}")

    @property
    def devices(self) -> tuple[str, ...]:
        """The names in `device`."""
        return devices_named(self.device)

    def _check_devices(self) -> None:
        """Raise ValueError for devices that do not go together."""
        names, ranks = devices_named(self.device), self.tensor_parallel
        ranks = values.whole("tensor_parallel", ranks, 1, MAX_DEVICES)
        if ranks > 1 and len(names) not in (1, ranks):
            raise ValueError(
                f"tensor_parallel is {ranks}, device names {len(names)} devices ({self.device}):"
                f" {ranks} names or one kind of device (cuda, cpu) are allowed"
            )
        if ranks > 1 and self.adapters:
            raise ValueError(
                f"tensor_parallel is {ranks}, and adapters are given: devices that divide blocks keep none"
            )


def _blocks(blocks: Any) -> Blocks:  # Any: to be checked
    """A run of blocks out of a pair.  Raises ValueError."""
    found = tuple(blocks) if isinstance(blocks, list | tuple) else ()
    if len(found) != 2:
        raise ValueError(f"blocks is {values.shown(blocks)}, a pair of numbers (start, stop) is needed")
    start = values.whole("the first of blocks", found[0], 0)
    stop = values.whole("the end of blocks", found[1])
    if start >= stop:
        raise ValueError(f"blocks is {values.shown(blocks)}, the start must be below the stop")
    return Blocks(start, stop)
