"""A file of settings in TOML: its bytes, its tables, and the keys that a command takes from it.

Keys outside of tables hold for every command of a program.  [node] and [client] hold for all commands of
`python -m node` and `python -m client`, [node.status] for one; [gateway] is [client.gateway].  The narrower
table wins.  A key that no command of its table has is an error, so that a misspelt one is noticed.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.config import ConfigError

MAX_FILE_BYTES = 1 << 20  # a thousand times what all flags together need
PROGRAMS = ("node", "client", "gateway")

Command = tuple[str, ...]
"""The words of a command: ("node",), ("node", "status"), ("client", "adapters", "list")."""

SHORT: Mapping[str, Command] = {"gateway": ("client", "gateway")}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a file.  where: for messages, "raceme.toml: [node] threads"."""

    name: str
    value: Any  # of TOML
    where: str


def read_document(path: Path) -> dict[str, Any]:  # Any: of TOML
    """The file's content.  Raises ConfigError where it cannot be read or is no TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"the configuration {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: byte {error.start + 1} is not UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def entries_for(
    document: Mapping[str, Any],  # Any: of TOML
    path: Path,
    command: Command,
    names: Mapping[Command, frozenset[str]],
) -> list[Entry]:
    """The keys that hold for a command, the widest table first.

    names: the names of the flags of each command of the program, this one included.  Raises ConfigError
    for a key or a table that no command has.
    """
    found = []
    for table, content in _tables(document, path, command, names):
        allowed = frozenset().union(*(each for other, each in names.items() if _is_below(other, table)))
        if len(table) > 1 and table in names:
            allowed = names[table]
        seen: set[str] = set()
        for key, value in content.items():
            name = key.replace("_", "-")
            where = f"{path}: {_header(table)}{key}"
            if name not in allowed:
                raise ConfigError(_unknown(where, key, value, table or command[:1], allowed))
            if name in seen:
                raise ConfigError(f"{where} is there twice, as {name} and as {name.replace('-', '_')}")
            seen.add(name)
            if name in names[command] and _is_below(command, table):
                found.append(Entry(name, value, where))
    return found


def _tables(
    document: Mapping[str, Any],  # Any: of TOML
    path: Path,
    command: Command,
    names: Mapping[Command, frozenset[str]],
) -> Iterator[tuple[Command, dict[str, Any]]]:
    """The tables of the command's program with their keys, without the tables in them; the widest first.

    Raises ConfigError for a table that is neither a program nor a command of this one.
    """
    programs = sorted({*PROGRAMS, command[0]})
    known = {other[:length] for other in names for length in range(1, len(other) + 1)}
    waiting: list[tuple[Command, Mapping[str, Any]]] = [((), document)]
    found: list[tuple[Command, dict[str, Any]]] = []
    while waiting:
        table, content = waiting.pop(0)
        found.append((table, {key: value for key, value in content.items() if not isinstance(value, dict)}))
        for key, value in content.items():
            if not isinstance(value, dict):
                continue
            below = SHORT.get(key, (key,)) if not table else (*table, key)
            if table and below not in known:
                raise ConfigError(_no_table(path, below, [each[-1] for each in known if each[:-1] == table]))
            if not table and key not in programs:
                raise ConfigError(_no_table(path, below, programs))
            if below in known:  # the tables of other programs are theirs to check
                waiting.append((below, value))
    yield from sorted(found, key=lambda each: len(each[0]))


def _is_below(command: Command, table: Command) -> bool:
    return command[: len(table)] == table


def _header(table: Command) -> str:
    return f"[{'.'.join(table)}] " if table else ""


def _no_table(path: Path, table: Command, allowed: Sequence[str]) -> str:
    above = "".join(f"{each}." for each in table[:-1])
    listed = ", ".join(f"[{above}{each}]" for each in sorted(allowed)) or "none"
    return f"{path}: [{'.'.join(table)}] is no command's table; tables here: {listed}"


def _unknown(where: str, key: str, value: Any, command: Command, allowed: frozenset[str]) -> str:  # Any: TOML
    close = difflib.get_close_matches(key.replace("_", "-"), sorted(allowed), n=1)
    program = f"python -m {' '.join(command)}"
    found = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{where} = {found}: {program} has no flag --{key.replace('_', '-')}, see its --help{hint}"
