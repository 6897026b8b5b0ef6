"""The command line of `python -m client gateway`: flags to settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from client.arguments import add_servers, add_swarm
from client.gateway.door.limits import HttpLimits, PrefixLimits, QueueLimits
from client.gateway.settings import GatewaySettings
from node.config import ConfigError
from node.runtime.arguments import Family, Parser, at_least_none, positive, seconds, size, with_peers
from node.runtime.console import argument_text
from node.runtime.interrupts import let_interrupts_through
from node.runtime.logs import set_up_logging
from node.runtime.settings.flags import OwnName

EPILOG = """\
examples:
  python -m client gateway --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3...
  OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python program.py

A line of the file of keys is NAME SHA256 [REQUESTS [TOKENS]], the last two for each minute.
exit codes: 0 after Ctrl-C or SIGTERM, 2 for what you must fix, 3 when the swarm is not complete after --wait
"""
MAX_PORT = 65535


def run_gateway(words: Sequence[str], family: Family | None = None) -> int:
    """Run the gateway; returns the exit code.  Raises ConfigError."""
    flags = parser(family).parse_args(words)
    set_up_logging("text")
    settings = settings_of(flags)
    check_listener(settings, no_keys=flags.no_keys)
    try:
        from client.gateway.command import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the gateway needs {error.name}, which is not installed: pip install ".[gateway]"'
            " in Raceme's folder"
        ) from None
    let_interrupts_through()
    flags = with_peers(flags)
    return serve(flags, settings)


def parser(family: Family | None = None) -> Parser:
    """The parser, with all flags.  family: that of `Parser`."""
    made = Parser(
        prog="python -m client gateway",
        description="Serve a swarm over OpenAI's HTTP API, with a page that shows the swarm.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        family=family,
    )
    add_swarm(made)
    made.add_argument(
        "--identity", type=Path, metavar="FILE",
        help="the key of this peer, made if it is not there (default: a new one for each run)",
    )  # fmt: skip
    made.add_argument(
        "--wait", type=seconds, default=30.0, metavar="SECONDS",
        help="for a complete swarm, at the start (default: 30)",
    )  # fmt: skip
    made.add_argument("--lazy", action="store_true", help="wait for a complete swarm for ever")
    add_servers(made)
    _add_http(made.add_argument_group("HTTP"))
    _add_models(made.add_argument_group("models"))
    _add_queue(made.add_argument_group("requests"))
    return made


def _add_http(group: argparse._ArgumentGroup) -> None:
    usual = GatewaySettings()
    group.add_argument(
        "--host", default=usual.host, metavar="ADDRESS", help=f"to listen at (default: {usual.host})"
    )
    group.add_argument("--port", type=_port, default=usual.port, help=f"(default: {usual.port}; 0: any)")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys of callers; SIGHUP reads it again"
    )
    group.add_argument(
        "--no-keys", action="store_true", help="let everybody who reaches --host call, without a key"
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="web pages of this origin may call, * for all; may be given again",
    )  # fmt: skip
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a name under which callers reach the gateway, * for any; may be given again",
    )  # fmt: skip
    group.add_argument(
        "--max-body", type=size, default=HttpLimits().max_body_bytes, metavar="SIZE",
        help="of a request (default: 4MiB)",
    )  # fmt: skip
    group.add_argument(
        "--max-connections-per-address", type=positive, default=HttpLimits().max_connections_per_address,
        metavar="N", help="but the loopback (default: 128; 1024 behind a balancer on another machine)",
    )  # fmt: skip
    group.add_argument("--no-ui", action="store_true", help="no page at /")
    group.add_argument(
        "--metrics", action=OwnName, choices=("open", "key", "off"), default=usual.metrics,
        help=f"/metrics for everybody, for callers with a key, or for nobody (default: {usual.metrics})",
    )  # fmt: skip
    group.add_argument(
        "--otlp-endpoint", metavar="URL",
        help="send a span of each request there, to OpenTelemetry over HTTP, for instance"
        " http://127.0.0.1:4318 (default: OTEL_EXPORTER_OTLP_ENDPOINT, else none)",
    )  # fmt: skip


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--served-name", metavar="NAME", help="of the model (default: its own)")
    group.add_argument(
        "--adapter", action="append", default=[], metavar="NAME",
        help="serve MODEL:NAME too: a folder of peft, NAME=FOLDER, or a name that servers keep",
    )  # fmt: skip
    group.add_argument(
        "--default-temperature", type=_temperature, default=1.0, metavar="T",
        help="of requests without a temperature (default: 1, as OpenAI's)",
    )  # fmt: skip


def _add_queue(group: argparse._ArgumentGroup) -> None:
    usual, kept = QueueLimits(), PrefixLimits()
    group.add_argument(
        "--max-concurrent", type=positive, default=usual.max_concurrent, metavar="N",
        help=f"answers at a time (default: {usual.max_concurrent}; a server takes 64 of one gateway)",
    )  # fmt: skip
    group.add_argument(
        "--max-queued", type=at_least_none, default=usual.max_queued, metavar="N",
        help=f"requests that wait for that (default: {usual.max_queued})",
    )  # fmt: skip
    group.add_argument(
        "--queue-seconds", type=seconds, default=usual.queue_seconds, metavar="SECONDS",
        help=f"the longest wait (default: {usual.queue_seconds:g})",
    )  # fmt: skip
    group.add_argument(
        "--max-kept", type=at_least_none, default=kept.max_conversations, metavar="N",
        help=f"conversations kept for their next turn (default: {kept.max_conversations})",
    )  # fmt: skip


def settings_of(flags: argparse.Namespace) -> GatewaySettings:
    """The settings that the flags say.  Raises ConfigError."""
    try:
        texts = {
            name: _texts(getattr(flags, name), name) for name in ("cors_origin", "allowed_host", "adapter")
        }
        served = flags.served_name
        served_name = None if served is None else argument_text(served, "--served-name")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if served_name is not None and not served_name.strip():
        raise ConfigError("--served-name is empty, a name is needed")
    return GatewaySettings(
        host=flags.host,
        port=flags.port,
        key_file=flags.api_key_file,
        cors_origins=texts["cors_origin"],
        allowed_hosts=texts["allowed_host"],
        served_name=served_name,
        adapters=texts["adapter"],
        default_temperature=flags.default_temperature,
        has_page=not flags.no_ui,
        metrics=flags.metrics,
        lazy=flags.lazy,
        wait_seconds=flags.wait,
        http=HttpLimits(
            max_body_bytes=flags.max_body,
            max_connections_per_address=flags.max_connections_per_address,
        ),
        queue=QueueLimits(flags.max_concurrent, flags.max_queued, flags.queue_seconds),
        prefixes=PrefixLimits(max_conversations=flags.max_kept),
    )


def check_listener(settings: GatewaySettings, *, no_keys: bool) -> None:
    """Raise ConfigError where callers of other machines would need no key, and nobody has said so."""
    if settings.key_file is not None and no_keys:
        raise ConfigError("--api-key-file and --no-keys: one of the two")
    if settings.key_file is None and not no_keys and not is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} is reached by other machines: give --api-key-file, or --no-keys to let"
            " everybody in"
        )


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach this address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _texts(words: Sequence[str], name: str) -> tuple[str, ...]:
    option = f"--{name.replace('_', '-')}"
    found = tuple(argument_text(word, option).strip() for word in words)
    if "" in found:
        raise ValueError(f"{option} is empty")
    return found


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 5 or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no port: 0 to {MAX_PORT} is allowed")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no temperature: 0 to 2 is allowed")
    return value
