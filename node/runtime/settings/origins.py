"""The origins of this process's settings, for errors that come after the flags were read.

A range that is checked later names its flag (`--min-replicas is 0, ...`); an operator who wrote a file
needs the file and the key too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_origins: dict[str, str] = {}  # of the one command that this process runs, by the flag's name


def remember_origins(origins: Mapping[str, str]) -> None:
    """Keep the origins of values, by the names of their flags; those of an earlier command are dropped."""
    _origins.clear()
    _origins.update(origins)


def with_origins(message: str) -> str:
    """The message, and after it the origin of each flag in it that the command line has not set.

    A flag counts as named by `--min-replicas` anywhere, or by `min_replicas` at the beginning.
    """
    named = {each.group(1) for each in re.finditer(r"(?<![\w-])--([a-z][\w-]*)", message)}
    if first := re.match(r"([a-z]\w*) ", message):
        named.add(first.group(1).replace("_", "-"))
    found = [origin for name, origin in _origins.items() if name in named and origin not in message]
    return f"{message} ({', '.join(found)})" if found else message
