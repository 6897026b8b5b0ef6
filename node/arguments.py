"""Command-line options that take several multiaddrs, with a positional argument allowed behind them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/")
_OPTIONS = frozenset({"--peers", "--listen", "--announce"})


def one_address_each(words: Sequence[str]) -> list[str]:
    """Rewrite `--peers A B` as `--peers=A --peers=B`, so that what follows is not taken for an address.

    argparse alone would read `generate --peers A "a prompt"` as two peers and no prompt.  The first
    word behind an option is its value whatever it is; further ones are while they look like multiaddrs.
    """
    result: list[str] = []
    option = None
    first = False
    for word in words:
        if word in _OPTIONS:
            option, first = word, True
        elif option is not None and ((first and not word.startswith("--")) or _MULTIADDR.match(word)):
            result.append(f"{option}={word}")
            first = False
        else:
            if first and option is not None:
                result.append(option)  # without a value: argparse says so
            option, first = None, False
            result.append(word)
    if first and option is not None:
        result.append(option)
    return result


def add_addresses(
    parser: argparse._ActionsContainer, option: str, *, help: str, required: bool = False
) -> None:
    """Add an option that `one_address_each` has prepared; its value is a list, empty by default."""
    parser.add_argument(
        option, action="append", default=[], metavar="MULTIADDR ...", help=help, required=required
    )
