"""The command line of `python -m client adapters`: flags to calls."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from node.config import DEFAULT_LISTEN, DEFAULT_MODEL
from node.runtime.arguments import Family, Parser, add_addresses, add_max_disk, add_ways_in, with_peers
from node.runtime.console import argument_text, fail
from node.runtime.interrupts import let_interrupts_through
from node.runtime.logs import set_up_logging

EPILOG = """\
An adapter is named NAME#DIGITS, with digits of its id; NAME alone will do while one adapter has the name.

examples:
  python -m client adapters list --json --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3...
  python -m client adapters get story#0123456789abcdef -o story --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3...
  python -m client adapters seed story --licence Apache-2.0 --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3...

A command's own options: python -m client adapters COMMAND --help
"""
TEXTS = ("name", "licence", "tag", "text")


def adapters_parser(family: Family | None = None) -> Parser:
    """The parser of `python -m client adapters` and of its commands.  family: that of `Parser`."""
    parser = Parser(
        prog="python -m client adapters",
        description="Shared adapters of a swarm: list, show, fetch, and give your own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        family=family,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_list(commands.add_parser("list", help="the adapters that somebody gives now"))
    _add_show(commands.add_parser("show", help="all that an adapter's card says, with its licence"))
    _add_get(commands.add_parser("get", help="fetch an adapter into a folder of peft"))
    _add_seed(commands.add_parser("seed", help="give the adapter of a folder to others"))
    return parser


def run_adapters(words: Sequence[str], family: Family | None = None) -> int:
    """Run a command; returns the exit code.  Raises ConfigError."""
    flags = adapters_parser(family).parse_args(words)
    set_up_logging("text")
    try:
        return _run(_with_texts(flags))
    except ValueError as error:
        return fail(error, 2)


def _run(flags: argparse.Namespace) -> int:
    from client.sharing.commands import run_get, run_list, run_seed, run_show
    from node.runtime.nurseries import run
    from tensor_codec.errors import PeerFault, Refused

    commands: dict[str, Callable[[argparse.Namespace], Awaitable[None]]] = {
        "list": run_list,
        "show": run_show,
        "get": run_get,
        "seed": run_seed,
    }
    let_interrupts_through()
    flags = with_peers(flags)
    try:
        run(partial(commands[flags.command], flags))
    except (PeerFault, Refused) as error:
        return fail(error, 4)
    return 0


def _with_texts(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with text in place of bytes.  Raises ValueError."""
    texts = {name: argument_text(getattr(flags, name, None) or "", f"--{name}") for name in TEXTS}
    return argparse.Namespace(**{**vars(flags), **texts})


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_list(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_swarm(parser)


def _add_show(parser: Parser) -> None:
    _add_name(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_swarm(parser)


def _add_get(parser: Parser) -> None:
    _add_name(parser)
    parser.add_argument(
        "-o", "--out", type=_path, required=True, metavar="FOLDER", help="to write; empty or not there yet"
    )
    _add_model(parser)
    _add_swarm(parser)


def _add_seed(parser: Parser) -> None:
    parser.add_argument("folder", type=_path, metavar="FOLDER", help="a folder of peft")
    parser.add_argument(
        "--licence",
        metavar="SPDX",
        help="what others may do with it, for instance Apache-2.0 (default: that of the folder's card)",
    )
    parser.add_argument("--name", metavar="TEXT", help="your name for it (default: the folder's)")
    parser.add_argument("--tag", metavar="TEXT", help="a version")
    parser.add_argument("--text", metavar="TEXT", help="a line about it, up to 200 characters")
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="the author's key (default: a new one each time)"
    )
    add_addresses(parser, "--listen", help=f"where to listen (default: {DEFAULT_LISTEN}, this machine only)")
    add_addresses(parser, "--announce", help="addresses for others to dial, in place of those listened on")
    _add_model(parser)
    _add_swarm(parser)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="NAME#DIGITS", help="of an adapter in the list")
    parser.add_argument("--author", metavar="ID", help="by this author, where several have signed cards")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help=f"the adapter's: a folder, a Hugging Face id, or a built-in name (default: {DEFAULT_MODEL})",
    )
    add_max_disk(parser)


def _add_swarm(parser: Parser) -> None:
    add_ways_in(parser)
    parser.add_argument("--swarm-key", type=Path, metavar="FILE", help="the key of a private swarm")
