"""Command-line options that take several multiaddrs, with a positional argument allowed after them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from node.runtime.console import one_line, put
from node.runtime.values import MAX_SECONDS, MAX_THREADS

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/")
_OPTIONS = frozenset({"--peers", "--listen", "--announce"})


def one_address_each(words: Sequence[str]) -> list[str]:
    """Rewrite `--peers A B` as `--peers=A --peers=B`, so that a following word is not taken for an address.

    argparse alone would read `generate --peers A "a prompt"` as two peers and no prompt.  The first
    first word after an option is its value; further words are values while they look like multiaddrs.
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


class Parser(argparse.ArgumentParser):
    """argparse's parser with errors that are harmless on a terminal for any argument."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print it.  Raises OutputError, which argparse would swallow."""
        if file is None:
            put(self.format_help())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and end with code 2."""
        super().error(one_line(message))


def positive(text: str, most: int = (1 << 40) - 1) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or len(text) > 20 or not 0 < int(text) <= most:
        limit = f", and {most} at the most" if most < 1 << 30 else ""
        raise argparse.ArgumentTypeError(f"{_brief(text)} is not a whole number of at least 1{limit}")
    return int(text)


def at_least_none(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return 0 if text == "0" else positive(text)


def threads(text: str) -> int:
    """A number of threads, for argparse."""
    return positive(text, MAX_THREADS)


def seconds(text: str) -> float:
    """A length of time, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{_brief(text)} is not 0 to {MAX_SECONDS:,.0f} seconds")
    return value


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def add_addresses(
    parser: argparse._ActionsContainer, option: str, *, help: str, required: bool = False
) -> None:
    """Add an option that `one_address_each` has prepared; its value is a list, empty by default."""
    parser.add_argument(
        option, action="append", default=[], metavar="MULTIADDR ...", help=help, required=required
    )
