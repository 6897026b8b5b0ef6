"""A file of settings in TOML: its bytes, its tables, and the keys that a command takes from it.

Keys outside of tables hold for every command of a program.  [node] and [client] hold for all commands of
`python -m node` and `python -m client`, [node.status] for one; [gateway] is [client.gateway].  The narrower
table wins.  A key that no command of its table has is an error, so that a misspelt one is noticed.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.config import ConfigError

MAX_FILE_BYTES = 1 << 20  # a thousand times what all flags together need
PROGRAMS = ("node", "client", "gateway")

Command = tuple[str, ...]
"""The words of a command: ("node",), ("node", "status"), ("client", "adapters", "list")."""

SHORT: Mapping[str, Command] = {"gateway": ("client", "gateway")}
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a key of TOML that needs no quotes
_MOST_SHOWN = 40  # characters of a value


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
        # The library's words for a key that is there twice.
        twice = ": a key is there twice" if str(error).startswith("Cannot overwrite a value") else ""
        raise ConfigError(f"{path} is not TOML: {error}{twice}") from None


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
    seen: dict[tuple[Command, str], str] = {}
    for table, header, content in _tables(document, path, command, names):
        allowed = frozenset().union(*(each for other, each in names.items() if _is_below(other, table)))
        if len(table) > 1 and table in names:
            allowed = names[table]
        for key, value in content.items():
            name = key.replace("_", "-")
            shown = f"{header}{_quoted(key)}"
            where = f"{path}: {shown}"
            if name not in allowed:
                if key in _tables_in(table, names):
                    raise ConfigError(_no_value(where, (*table, key), value))
                raise ConfigError(_unknown(where, key, value, table or command[:1], allowed))
            if (table, name) in seen:
                raise ConfigError(f"{where} is there twice, as {seen[table, name]} and as {shown}")
            seen[table, name] = shown
            if name in names[command] and _is_below(command, table):
                found.append(Entry(name, value, where))
    return found


def _tables(
    document: Mapping[str, Any],  # Any: of TOML
    path: Path,
    command: Command,
    names: Mapping[Command, frozenset[str]],
) -> Iterator[tuple[Command, str, dict[str, Any]]]:
    """The tables of the command's program, the widest first: the command, as written ("[gateway] "), keys.

    The tables in a table are none of its keys.  Raises ConfigError for a table that is neither a program
    nor a command of this one.
    """
    known = {other[:length] for other in names for length in range(1, len(other) + 1)}
    waiting: list[tuple[Command, Command, Mapping[str, Any]]] = [((), (), document)]
    found: list[tuple[Command, str, dict[str, Any]]] = []
    while waiting:
        table, written, content = waiting.pop(0)
        keys = {key: value for key, value in content.items() if not isinstance(value, dict)}
        found.append((table, f"[{_dotted(written)}] " if written else "", keys))
        allowed = {*_tables_in(table, names), *(() if table else command[:1])}
        for key, value in content.items():
            if not isinstance(value, dict):
                continue
            below = SHORT.get(key, (key,)) if not table else (*table, key)
            if key not in allowed:
                raise ConfigError(_no_table(path, (*written, key), allowed, names))
            if below in known:  # the tables of other programs are theirs to check
                waiting.append((below, (*written, key), value))
    yield from sorted(found, key=lambda each: len(each[0]))


def _tables_in(table: Command, names: Mapping[Command, frozenset[str]]) -> set[str]:
    """The names of the tables that a table may have."""
    if not table:
        return {*PROGRAMS, *(command[0] for command in names)}
    size = len(table)
    return {command[size] for command in names if len(command) > size and _is_below(command, table)}


def _is_below(command: Command, table: Command) -> bool:
    return command[: len(table)] == table


def _quoted(key: str) -> str:
    """A key as TOML has it."""
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def _dotted(table: Command) -> str:
    return ".".join(_quoted(each) for each in table)


def _no_table(
    path: Path, written: Command, allowed: Collection[str], names: Mapping[Command, frozenset[str]]
) -> str:
    *above, last = written
    found = f"{path}: [{_dotted(written)}]"
    if any(last.replace("_", "-") in each for each in names.values()):
        return f"{found} is no table: {_quoted(last)} is a flag, with a value after ="
    listed = ", ".join(f"[{_dotted((*above, each))}]" for each in sorted(allowed)) or "none"
    meant = sorted(_dotted(command) for command in names if len(command) > 1 and command[-1] == last)
    hint = f"; did you mean [{meant[0]}]?" if meant else ""
    return f"{found} is no command's table; tables here: {listed}{hint}"


def _no_value(where: str, table: Command, value: Any) -> str:  # Any: TOML
    """A value in the place of a table, [[node]] included."""
    header = f"[{_dotted(table)}]"
    return f"{where} = {_brief(value)}: {header} is a table of flags, which begins with a line {header}"


def _unknown(where: str, key: str, value: Any, command: Command, allowed: frozenset[str]) -> str:  # Any: TOML
    name = key.replace("_", "-").lstrip("-").lower()
    if name in allowed:
        return f"{where} = {_brief(value)}: the key of this flag is {name}"
    close = difflib.get_close_matches(name, sorted(allowed), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    program = f"python -m {' '.join(command)}"
    if not _BARE.fullmatch(name):
        return f"{where} = {_brief(value)}: {program} has no flag of this name, see its --help{hint}"
    return f"{where} = {_brief(value)}: {program} has no flag --{name}, see its --help{hint}"


def _brief(value: Any) -> str:  # Any: TOML
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
