"""The precedence of settings: the command line, then the environment, then the file, then the defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node.config import ConfigError
from node.runtime.settings.file import Entry
from node.runtime.settings.flags import UNSET, Flag, from_text, from_toml, variable_of, words_of

PRECEDENCE = (
    "A flag's value is that of the command line, else of its environment variable (--swarm-key:"
    " RACEME_SWARM_KEY, or RACEME_NODE_SWARM_KEY for one program), else of its key in the file (swarm-key),"
    " else its default."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag's value and its origin: "RACEME_THREADS", or "raceme.toml: [node] threads".

    words: what the source says, before it was converted; a list for a flag that is one.
    """

    value: Any  # the type of the flag
    origin: str
    words: Any = None  # of TOML, or texts


def of_environment(flags: Sequence[Flag], environ: Mapping[str, str]) -> dict[str, Setting]:
    """The settings of the environment by the flag's `dest`; an empty variable counts as none.

    Of a flag's variables the narrowest counts.  Raises ConfigError for a value that the flag does not take,
    and for one that it would take in a variable that is another flag's.
    """
    found = {}
    for flag in flags:
        variable = next((each for each in flag.variables if environ.get(each)), None)
        if variable is None:
            _refuse_taken(flag, environ)
            continue
        text = environ[variable]
        try:
            words = words_of(flag, text)
            found[flag.action.dest] = Setting(from_text(flag, text), variable, words)
        except ValueError as error:
            raise ConfigError(f"{variable}: {error}") from None
    return found


def _refuse_taken(flag: Flag, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where a flag with a name of its own was meant by the variable of another flag."""
    wide = variable_of(flag.name)
    if not flag.has_own_name or not (text := environ.get(wide)):
        return
    try:
        from_text(flag, text)
    except ValueError:
        return  # it was meant for the other one
    command = " ".join(flag.command)
    raise ConfigError(
        f"{wide} is {text}: --{flag.name} of python -m {command} has the variable {flag.variable}"
    )


def of_file(flags: Sequence[Flag], entries: Sequence[Entry]) -> dict[str, Setting]:
    """The settings of a file by the flag's `dest`; later entries win.

    Raises ConfigError for a value that the flag does not take.
    """
    by_name = {flag.name: flag for flag in flags}
    found = {}
    for entry in entries:
        flag = by_name[entry.name]
        try:
            words = entry.value if not flag.is_list or isinstance(entry.value, list) else [entry.value]
            found[flag.action.dest] = Setting(from_toml(flag, entry.value), entry.where, words)
        except ValueError as error:
            raise ConfigError(f"{entry.where}: {error}") from None
    return found


def in_force(
    given: Collection[str],
    sources: Sequence[Mapping[str, Setting]],
    exclusive: Sequence[Collection[str]] = (),
) -> dict[str, Setting]:
    """The settings that replace defaults, by `dest`.

    given: the flags of the command line, which no source changes.  sources: those of more weight first.
    exclusive: flags of which one may be given: that of the weightiest source counts.  Raises ConfigError
    where one source has two of these.
    """
    decided = set(given)
    found: dict[str, Setting] = {}
    closed = [frozenset(group) for group in exclusive if decided.intersection(group)]
    for source in sources:
        new = {
            dest: setting
            for dest, setting in source.items()
            if dest not in decided and not any(dest in group for group in closed)
        }
        decided.update(new)
        new = {dest: setting for dest, setting in new.items() if setting.value is not UNSET}
        for group in exclusive:
            origins = [setting.origin for dest, setting in new.items() if dest in group]
            if len(origins) > 1:
                raise ConfigError(f"{origins[0]} and {origins[1]} exclude each other: leave one out")
            if origins:
                closed.append(frozenset(group))
        found |= new
    return found
