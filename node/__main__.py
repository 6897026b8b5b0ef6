"""The command line of a node, and nothing else: flags to a config, errors to one line and an exit code.

Nothing heavy is imported before it is needed: `--help`, `status`, `models` and `new-swarm-key` start
without torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from node.config import (
    CODECS_OF_A_NODE,
    DEFAULT_LISTEN,
    DEFAULT_MODEL,
    DTYPE_CHOICES,
    KV_CACHE_DTYPES,
    LAN_LISTEN,
    QUANTIZE_CHOICES,
    BalanceConfig,
    ConfigError,
    NetworkConfig,
    NodeConfig,
)
from node.imports import uncollected_imports
from node.runtime.arguments import (
    Parser,
    add_addresses,
    add_max_disk,
    add_ways_in,
    at_least_none,
    command_first,
    devices,
    one_address_each,
    positive,
    ranks,
    threads,
    with_peers,
)
from node.runtime.console import argument_text, put_line, run_command, run_process
from node.runtime.interrupts import let_interrupts_through
from node.runtime.logs import set_up_logging
from tensor_codec.blocks import Blocks
from tensor_codec.limits import (
    CHOICES,
    LEAST_SHARE,
    Limits,
    limits_with,
    share_of_a_peer,
    with_shares,
)

MAX_REPLICAS = 1000
USUAL = Limits()
PATIENCE_SECONDS = 10.0  # nodes that start together may start in any order

EPILOG = f"""\
commands:
  python -m node [MODEL] ...            serve blocks of a model (default: {DEFAULT_MODEL})
  python -m node bootstrap ...          help others find each other; needs no model
  python -m node status --peers ...     show a swarm: peers, blocks, rates, coverage
  python -m node models                 list the models in the cache, fetch one, or bound them all
  python -m node prepare MODEL OUT      write a model in 8 bits, so that a node opens it at once
  python -m node new-swarm-key FILE     make the key of a private swarm

examples:
  python -m node                                          a new swarm, with as many blocks as fit
  python -m node --peers /ip4/10.0.0.5/tcp/31330/p2p/12D3...   join it from another machine
  python -m node --listen /ip4/0.0.0.0/tcp/31330          be reachable from other machines
  python -m node --lan                                    join, or found, a swarm of the local network

A command's own options: python -m node COMMAND --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error that the operator must fix."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "bootstrap": _bootstrap,
        "status": _status,
        "models": _models,
        "prepare": _prepare,
        "new-swarm-key": _new_swarm_key,
    }
    words = command_first(one_address_each(sys.argv[1:] if arguments is None else arguments), commands)
    command = commands.get(words[0]) if words else None
    return run_command(partial(command, words[1:]) if command else partial(_serve, words))


def parsers() -> list[Parser]:
    """The parser of each command."""
    return [
        _serve_parser(),
        _bootstrap_parser(),
        _status_parser(),
        _models_parser(),
        _prepare_parser(),
        _new_swarm_key_parser(),
    ]


def _serve_parser() -> Parser:
    parser = _parser("", "Serve blocks of a model in a swarm.", epilog=EPILOG)
    parser.add_argument(
        "model", nargs="?", help=f"a folder, a Hugging Face id, or a built-in name (default: {DEFAULT_MODEL})"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--blocks", type=_blocks, metavar="A:B", help="serve blocks A to B-1")
    which.add_argument(
        "--num-blocks", type=positive, metavar="N", help="serve the N blocks that the swarm needs most"
    )
    _add_network_options(parser)
    _add_device_options(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="what to compute in (auto: bfloat16 where the hardware has it)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE_CHOICES,
        help="keep the blocks' matrices in 8 or 4 bits (default: int8 on CUDA, none elsewhere); llm_int8:"
        " 8 bits as bitsandbytes multiplies them, on CUDA alone",
    )
    _add_adapter_option(parser)
    parser.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="threads of torch (default: the cores divided by the servers on this machine)",
    )
    parser.add_argument(
        "--cache-tokens",
        type=positive,
        metavar="N",
        help="tokens of all sessions together in the KV cache (default: as many as fit)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="keys and values in the KV cache on a CPU; auto: bfloat16 where matrices have 8 or 16 bits, else"
        " as activations (default: auto)",
    )
    parser.add_argument(
        "--journal-tokens",
        type=at_least_none,
        metavar="N",
        help="outputs kept for a replay should the next server die (default: as many tokens as the cache)",
    )
    parser.add_argument(
        "--codec",
        choices=CODECS_OF_A_NODE,
        default="auto",
        help="hidden states on the wire; auto: as each client chooses; exact: none that lose values, to or"
        " from this node, and clients with --codec fast take it so (default: auto)",
    )
    add_max_disk(parser)
    parser.add_argument(
        "--vitals-file",
        type=Path,
        metavar="PATH",
        help="write here once a second what the node holds: memory, connections, sessions, tasks",
    )
    _add_limit_options(parser)
    _add_balance_options(parser)
    return parser


def _serve(words: list[str]) -> int:
    flags = _serve_parser().parse_args(words)
    set_up_logging(flags.log_format)
    config = NodeConfig(
        network=_network(flags),
        model=flags.model,
        blocks=flags.blocks,
        num_blocks=flags.num_blocks,
        device=flags.device,
        tensor_parallel=flags.tensor_parallel,
        dtype=flags.dtype,
        quantize=flags.quantize,
        threads=flags.threads,
        cache_tokens=flags.cache_tokens,
        kv_cache_dtype=flags.kv_cache_dtype,
        journal_tokens=flags.journal_tokens,
        codec=flags.codec,
        balance=_balance(flags),
        vitals_file=flags.vitals_file,
        max_disk_bytes=flags.max_disk,
        adapters=tuple(flags.adapter),
    )
    with uncollected_imports():
        from node.main import serve

    return _run(partial(serve, config))


def _bootstrap_parser() -> Parser:
    parser = _parser("bootstrap", "Help the nodes of a swarm find each other; serves no model.")
    _add_network_options(parser)
    return parser


def _bootstrap(words: list[str]) -> int:
    flags = _bootstrap_parser().parse_args(words)
    set_up_logging(flags.log_format)
    from node.main import run_bootstrap

    return _run(partial(run_bootstrap, _network(flags)))


def _status_parser() -> Parser:
    parser = _parser("status", "Show a swarm: its peers, their blocks and rates, the coverage of each block.")
    add_ways_in(parser)
    parser.add_argument("--swarm-key", type=Path, metavar="FILE", help="the key of a private swarm")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch a line each time")
    parser.add_argument("--watch", action="store_true", help="repeat until Ctrl-C, and show each move")
    parser.add_argument(
        "--chains", type=positive, default=0, metavar="N",
        help="show the N best chains too, with as few servers in common as possible",
    )  # fmt: skip
    parser.add_argument(
        "--ask", action="store_true",
        help="ask servers for their free cache, queue and sessions of this moment; not with --watch",
    )  # fmt: skip
    return parser


def _status(words: list[str]) -> int:
    parser = _status_parser()
    flags = parser.parse_args(words)
    if flags.ask and flags.watch:
        parser.error("--ask goes without --watch")
    set_up_logging("text", logging.WARNING)
    from node.monitor.status import show_status
    from node.monitor.watch import watch_status

    config = NetworkConfig(peers=tuple(with_peers(flags).peers), swarm_key=flags.swarm_key, listen=())
    if flags.watch:
        return _run(partial(watch_status, config, as_json=flags.json, chains=flags.chains))
    return _run(partial(show_status, config, as_json=flags.json, chains=flags.chains, ask=flags.ask))


def _models_parser() -> Parser:
    parser = _parser("models", "List the models in the cache, and the built-in default.")
    parser.add_argument("--fetch", metavar="MODEL", help="fetch a model into the cache")
    add_max_disk(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _models(words: list[str]) -> int:
    flags = _models_parser().parse_args(words)
    set_up_logging("text", logging.WARNING)
    from node.monitor.models import fetch_model, show_models

    let_interrupts_through()
    if flags.fetch is not None:
        fetch_model(flags.fetch, max_disk_bytes=flags.max_disk)
    else:
        show_models(as_json=flags.json, max_disk_bytes=flags.max_disk)
    return 0


def _prepare_parser() -> Parser:
    parser = _parser("prepare", "Write a model's checkpoint in 8 bits, so that a node opens it at once.")
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hugging Face id, or a built-in name")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; empty or not there yet")
    parser.add_argument("--quantize", choices=("int8",), default="int8", help="how matrices are kept")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the tensors that are not quantised (default: unchanged)",
    )
    add_max_disk(parser)
    return parser


def _prepare(words: list[str]) -> int:
    flags = _prepare_parser().parse_args(words)
    set_up_logging("text", logging.WARNING)
    from node.model.blocks.span import DTYPES
    from node.model.checkpoint.folder import HashMemo
    from node.model.checkpoint.prepare import prepare, size_of
    from node.model.checkpoint.progress import progress_bar
    from node.model.checkpoint.source import cache_dir, resolve

    let_interrupts_through()
    with progress_bar(sys.stderr) as progress:
        folder = resolve(flags.model, cache_dir=cache_dir(), progress=progress, max_disk_bytes=flags.max_disk)
        dtype = None if flags.dtype is None else DTYPES[flags.dtype]
        memo = HashMemo(cache_dir() / "hashes.json")
        prepare(folder, flags.out, memo=memo, dtype=dtype, progress=progress)
    put_line(f"{folder.name} (revision {folder.revision}) in {flags.quantize} is in {flags.out},")
    put_line(f"{size_of(flags.out) / 1e6:.0f} MB; serve it with: python -m node {flags.out}")
    return 0


def _new_swarm_key_parser() -> Parser:
    parser = _parser("new-swarm-key", "Make the key of a private swarm; every member needs a copy.")
    parser.add_argument("file", type=Path, metavar="FILE", help="where to write it; must not exist")
    return parser


def _new_swarm_key(words: list[str]) -> int:
    flags = _new_swarm_key_parser().parse_args(words)
    from node.network.transport.membership import new_swarm_key

    new_swarm_key(flags.file)
    put_line(f"wrote {flags.file}: give it to every member, and to nobody else")
    return 0


def _run(main: Callable[[], Awaitable[None]]) -> int:
    from node.runtime.nurseries import run

    let_interrupts_through()
    run(main)
    return 0


def _parser(command: str, description: str, epilog: str | None = None) -> Parser:
    return Parser(
        prog=f"python -m node {command}".strip(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        family=parsers,
    )


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network")
    add_addresses(
        network, "--peers", help="nodes of the swarm to join, as they print it (default: a new swarm)"
    )
    network.add_argument("--swarm-key", type=Path, metavar="FILE", help="the key of a private swarm")
    network.add_argument(
        "--identity", type=Path, metavar="FILE", help="keep the peer id here (default: a new one each time)"
    )
    add_addresses(network, "--listen", help=f"where to listen (default: {DEFAULT_LISTEN}, this machine only)")
    add_addresses(network, "--announce", help="addresses for others to dial, in place of those listened on")
    network.add_argument(
        "--require-reach", action="store_true",
        help="end with exit code 2 where other nodes cannot dial this one and none relays for it",
    )  # fmt: skip
    lan = network.add_mutually_exclusive_group()
    lan.add_argument(
        "--lan", action="store_true",
        help="announce this node in the local network and join what is there; without --listen, listen on all"
        " IPv4 interfaces (default: where --listen is beyond loopback; it joins where --peers is not given)",
    )  # fmt: skip
    lan.add_argument("--no-lan", action="store_true", help="neither announce nor look in the local network")
    network.add_argument(
        "--no-port-mapping", action="store_true",
        help="do not ask the router to forward the port of --listen (by NAT-PMP or UPnP)",
    )  # fmt: skip
    add_addresses(
        network, "--relay", help="peers that shall relay to this node, also ones of another libp2p network"
    )
    network.add_argument(
        "--no-relay", action="store_true", help="carry no bytes between peers behind NAT and others"
    )
    network.add_argument(
        "--relay-mbit", type=positive, metavar="MBIT",
        help="for all peers to which this node relays, in Mbit/s"
        f" (default: {8 * USUAL.relay_bytes_per_second / 1e6:g})",
    )  # fmt: skip
    network.add_argument("--name", default="", metavar="TEXT", help="a name to show in the status")
    network.add_argument(
        "--record-ttl",
        type=float,
        default=None,
        metavar="SECONDS",
        help="how long a record of this node stays valid (default: 90)",
    )
    network.add_argument(
        "--ready-file", type=Path, metavar="PATH", help="write a JSON object here once the node is online"
    )
    network.add_argument(
        "--metrics", metavar="HOST:PORT",
        help="serve /metrics (Prometheus) and /health there, for instance 127.0.0.1:9464",
    )  # fmt: skip
    network.add_argument(
        "--metrics-host", action="append", default=[], metavar="NAME",
        help="a name under which other machines may ask for metrics, * for any; needed where the address of"
        " --metrics is not of this machine alone",
    )  # fmt: skip
    network.add_argument("--log-format", choices=("text", "json"), default="text")


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits", "Bounds for a session or a request of a peer.")
    limits.add_argument(
        "--max-session-tokens", type=positive, metavar="N",
        help="rows times positions of a session (default: what the cache holds)",
    )  # fmt: skip
    limits.add_argument(
        "--max-step-tokens", type=positive, metavar="N",
        help="rows times positions of one step, or of a request without a session"
        f" (default: {USUAL.max_step_tokens})",
    )  # fmt: skip
    limits.add_argument(
        "--max-frame-bytes", type=positive, metavar="N",
        help=f"bytes of one message, which bound a step too (default: {USUAL.max_frame_bytes})",
    )  # fmt: skip
    limits.add_argument(
        "--session-life-seconds", type=float, metavar="SECONDS",
        help=f"of a session (default: {USUAL.session_life_seconds:g}), and"
        f" {USUAL.session_position_seconds:g} more for each position that it was opened for",
    )  # fmt: skip
    limits.add_argument(
        "--session-idle-seconds", type=float, metavar="SECONDS",
        help=f"between two steps of a session (default: {USUAL.session_idle_seconds:g})",
    )  # fmt: skip
    limits.add_argument(
        "--share", type=_share, action="append", default=[], metavar="PEER=SHARE",
        help="give this peer, a gateway for instance, so much of all that peers share (cache, streams, steps,"
        f" adapters; {LEAST_SHARE:g} to 1), in place of {USUAL.cache_share_per_peer:g} or less;"
        " may be repeated",
    )  # fmt: skip
    limits.add_argument(
        "--tape-bytes", type=int, metavar="N",
        help="of the memory for gradients, for graphs of forwards that a backward follows; 0: none is kept"
        f" (default: {USUAL.tape_bytes})",
    )  # fmt: skip


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=devices,
        default="auto",
        metavar="DEVICE[,DEVICE]",
        help="auto, cpu, cuda, cuda:1 for a second GPU, mps (default: the fastest that is there);"
        " cuda:0,cuda:1: the blocks lie on both, one after the other, by their free memory",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=ranks,
        default=1,
        metavar="N",
        help="divide each block among N devices, the first ones or those of --device, each with a process of"
        " its own; without adapters (default: 1)",
    )


def _add_adapter_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="keep an adapter (LoRA) for every client: a folder of peft or a hub's id; up to four",
    )


def _add_balance_options(parser: argparse.ArgumentParser) -> None:
    usual = BalanceConfig()
    balance = parser.add_argument_group(
        "balance", "Without --blocks a node moves to where the swarm needs it, and never opens a gap."
    )
    balance.add_argument(
        "--balance-quality",
        type=float,
        default=usual.quality,
        metavar="SHARE",
        help="stay while the swarm can do this share of what its servers could do at best; 0: move only to"
        f" blocks that nobody serves (default: {usual.quality:g})",
    )
    balance.add_argument(
        "--min-replicas",
        type=int,
        default=usual.min_replicas,
        metavar="N",
        help="servers that each block should have, where that costs no speed"
        f" (default: {usual.min_replicas})",
    )
    balance.add_argument(
        "--balance-seconds",
        type=float,
        default=usual.seconds,
        metavar="SECONDS",
        help=f"between looks for a better place, on average (default: {usual.seconds:g})",
    )


def _balance(flags: argparse.Namespace) -> BalanceConfig:
    """Raises ConfigError."""
    if not 0 <= flags.balance_quality <= 1:
        raise ConfigError(f"--balance-quality is {flags.balance_quality:g}, 0 to 1 is allowed")
    if not 1 <= flags.min_replicas <= MAX_REPLICAS:
        raise ConfigError(f"--min-replicas is {flags.min_replicas}, 1 to {MAX_REPLICAS} are allowed")
    if not 1 <= flags.balance_seconds <= 86_400:
        raise ConfigError(f"--balance-seconds is {flags.balance_seconds:g}, 1 to 86400 are allowed")
    return BalanceConfig(flags.balance_quality, flags.min_replicas, flags.balance_seconds)


def _limits(flags: argparse.Namespace) -> Limits:
    """Raises ConfigError."""
    try:
        limits = limits_with(
            **{name: getattr(flags, name, None) for name in CHOICES}
        )  # bootstrap lacks these flags
        return with_shares(limits, getattr(flags, "share", []))
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None


def _network(flags: argparse.Namespace) -> NetworkConfig:
    limits = _limits(flags)
    if flags.record_ttl is not None:
        most = limits.record_life_seconds
        if not 1 <= flags.record_ttl <= most:
            raise ConfigError(f"--record-ttl is {flags.record_ttl}, 1 to {most:g} seconds are allowed")
        limits = replace(limits, record_ttl_seconds=flags.record_ttl, announce_seconds=flags.record_ttl / 3)
    if flags.relay_mbit is not None:
        limits = replace(limits, relay_bytes_per_second=flags.relay_mbit * 1_000_000 // 8)
    try:
        name = argument_text(flags.name, "--name")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if len(name) > 64 or not name.isprintable():
        raise ConfigError(f"--name has {len(name)} characters, 64 printable ones are allowed")
    return NetworkConfig(
        peers=tuple(flags.peers),
        swarm_key=flags.swarm_key,
        identity=flags.identity,
        listen=tuple(flags.listen) or (LAN_LISTEN if flags.lan else DEFAULT_LISTEN,),
        announce=tuple(flags.announce),
        port_mapping=not flags.no_port_mapping,
        lan=True if flags.lan else False if flags.no_lan else None,
        name=name,
        patience_seconds=PATIENCE_SECONDS,
        limits=limits,
        ready_file=flags.ready_file,
        metrics=flags.metrics,
        metrics_hosts=tuple(flags.metrics_host),
        require_reach=flags.require_reach,
        relays=tuple(flags.relay),
        relay=not flags.no_relay,
    )


def _share(text: str) -> tuple[str, float]:
    from routing.names import PeerId, public_key_of

    try:
        peer, share = share_of_a_peer(text)
        public_key_of(PeerId(peer))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return peer, share


def _blocks(text: str) -> Blocks:
    try:
        return Blocks.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    run_process(main)
