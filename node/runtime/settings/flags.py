"""The flags of an argparse parser as keys of a file and variables of the environment.

Everything is derived from the parser, so a new flag has its key (`swarm-key`) and its variable
(`RACEME_SWARM_KEY`) at once.  A variable may name a command too, as the tables of a file do:
RACEME_NODE_THREADS is for `python -m node` and its commands, RACEME_GATEWAY_PORT for the gateway alone; the
narrower one wins.
Values go through the flag's own `type` and `choices`, as words of a command line do, and keep its errors.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from node.runtime.settings.file import SHORT, Command

PREFIX = "RACEME_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
OWN = ("help", "version", "config", "print-config")  # flags of the command line alone
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_SPLIT = re.compile(r"[,\s]+")
_KINDS = {int: "a whole number", float: "a number", Path: "a path"}
_SHOWN_CHARACTERS = 60


class _Unset:
    """The value of a switch or a list that a source sets back to the default."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = _Unset()


class OwnName(argparse._StoreAction):
    """The action of a flag whose name means something else elsewhere: its variables name its command."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag, or one argument that may be left out.

    name: its key in a file ("swarm-key").  command: that has it.
    """

    name: str
    action: argparse.Action
    command: Command = ()

    @property
    def has_own_name(self) -> bool:
        """See `OwnName`."""
        return isinstance(self.action, OwnName)

    @property
    def variable(self) -> str:
        """Its variable in the environment ("RACEME_SWARM_KEY"): the widest one."""
        return self.variables[0 if self.has_own_name else -1]

    @property
    def variables(self) -> tuple[str, ...]:
        """All of its variables, the narrowest first: "RACEME_NODE_SWARM_KEY", "RACEME_SWARM_KEY"."""
        found = []
        for length in range(len(self.command), 0, -1):
            table = self.command[:length]
            short = [(name,) for name, command in SHORT.items() if command == table]
            found += [variable_of("-".join((*each, self.name))) for each in (*short, table)]
        return tuple(found) if self.has_own_name else (*found, variable_of(self.name))

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value on the command line."""
        return self.action.nargs == 0

    @property
    def is_list(self) -> bool:
        """Whether it takes several values, by being repeated or in a row."""
        several = self.action.nargs in ("*", "+") or isinstance(self.action.nargs, int)
        return isinstance(self.action, argparse._AppendAction) or (several and not self.is_switch)

    def as_written(self, value: Any) -> Any:  # Any: the type of the flag
        """A value as a file has it: of a switch whether it is on."""
        if self.is_switch and not isinstance(self.action, argparse.BooleanOptionalAction):
            return bool(value == self.action.const)
        return value


def variable_of(name: str) -> str:
    """The variable in the environment of a flag's name."""
    return PREFIX + name.replace("-", "_").upper()


def flags_of(parser: argparse.ArgumentParser) -> list[Flag]:
    """The flags of a command, in the order of its help; required arguments are none."""
    command = command_of(parser)
    return [Flag(name, action, command) for name, action in _named(parser) if name not in OWN]


def command_of(parser: argparse.ArgumentParser) -> Command:
    """The words that name a parser's command: ("node", "status")."""
    return tuple(parser.prog.removeprefix("python -m ").split())


def _named(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        if action.option_strings:
            long = next((each for each in action.option_strings if each.startswith("--")), None)
            yield (long or action.option_strings[0]).lstrip("-"), action
        elif action.nargs == "?":
            yield action.dest.replace("_", "-"), action


def from_text(flag: Flag, text: str) -> Any:  # Any: the type of the flag
    """The value of a variable.  Raises ValueError that says what was found and what is allowed.

    A list is a TOML array, or values between commas or blanks.
    """
    if flag.is_switch:
        word = text.strip().lower()
        if word not in _YES + _NO:
            raise ValueError(f"{_shown(text)} is not one of {', '.join(_YES + _NO)}")
        return _switched(flag, word in _YES)
    if not flag.is_list:
        return _converted(flag, text)
    if text.lstrip().startswith("["):
        return from_toml(flag, _array(text))
    return _listed(flag, [_converted(flag, each) for each in _SPLIT.split(text) if each])


def words_of(flag: Flag, value: Any) -> Any:  # Any: of TOML, or the text of a variable
    """What a source says, before it is converted: a list of a flag that is one, else the value."""
    if not flag.is_list or isinstance(value, list):
        return value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return _array(value)
        except ValueError:
            return [value]
    return [each for each in _SPLIT.split(value) if each] if isinstance(value, str) else [value]


def _array(text: str) -> list[Any]:  # Any: of TOML
    """Raises ValueError for anything but one array."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_shown(text)} is not an array of TOML: {error}") from None
    if len(document) != 1 or not isinstance(document["value"], list):
        raise ValueError(f"{_shown(text)} is not an array of TOML: something follows it")
    values: list[Any] = document["value"]
    return values


def from_toml(flag: Flag, value: Any) -> Any:  # Any: of TOML; the type of the flag
    """The value of a key.  Raises ValueError that says what was found and what is allowed."""
    if flag.is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{_shown(value)} is {_kind(value)}, true or false is needed")
        return _switched(flag, value)
    if flag.is_list:
        values = value if isinstance(value, list) else [value]
        return _listed(flag, [_scalar(flag, each) for each in values])
    return _scalar(flag, value)


def _switched(flag: Flag, on: bool) -> Any:  # Any: the type of the flag
    if isinstance(flag.action, argparse.BooleanOptionalAction):
        return on
    return flag.action.const if on else UNSET


def _listed(flag: Flag, values: list[Any]) -> Any:  # Any: the type of the flag
    if isinstance(nargs := flag.action.nargs, int) and len(values) != nargs:
        raise ValueError(f"{len(values)} values were found, {nargs} are needed")
    return values or UNSET


def _scalar(flag: Flag, value: Any) -> Any:  # Any: of TOML; the type of the flag
    """One value.  A number is written without quotes and a text with them, as TOML has both."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        wanted = "an array" if flag.is_list else "one value"
        raise ValueError(f"{_shown(value)} is {_kind(value)}, {wanted} is needed")
    found = _converted(flag, value if isinstance(value, str) else repr(value))
    if isinstance(value, str) and isinstance(found, int | float) and _is_number(value):
        raise ValueError(f"{_shown(value)} is text, a number is needed: without quotes")
    if not isinstance(value, str) and isinstance(found, str | os.PathLike):
        raise ValueError(f"{_shown(value)} is a number, text is needed: in quotes")
    return found


def _converted(flag: Flag, text: str) -> Any:  # Any: the type of the flag
    """A word as argparse converts it, with ~ resolved in a path, which a shell would have done."""
    if "\0" in text:
        raise ValueError(f"{_shown(text)} has a character NUL")
    convert = flag.action.type
    if convert is Path and not text:
        raise ValueError("'' is empty, a path is needed")
    try:
        found = convert(text) if callable(convert) else text
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    except (TypeError, ValueError) as error:
        kind = _KINDS.get(convert) if isinstance(convert, type) else None
        raise ValueError(f"{_shown(text)} is not {kind}" if kind else str(error)) from None
    if isinstance(found, Path) and text.startswith("~"):
        found = at_home(found)
    if flag.action.choices is not None and found not in flag.action.choices:
        allowed = ", ".join(str(each) for each in flag.action.choices)
        raise ValueError(f"{_shown(found)} is not one of {allowed}")
    return found


def at_home(path: Path) -> Path:
    """A path with ~ resolved, as a shell would have done.  Raises ValueError for a user that is not there."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{_shown(str(path))} begins with the home folder of no user") from None


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def _kind(value: Any) -> str:  # Any: of TOML
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "an array"}
    return kinds.get(type(value), "a table" if isinstance(value, dict) else "a date or a time")


def _shown(value: Any) -> str:  # Any: of TOML
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float | list | dict):
        return str(value)
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
