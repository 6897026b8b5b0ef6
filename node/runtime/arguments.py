"""The parser of all command lines: flags from a file and the environment too, errors in one line.

Options may take several multiaddrs, with a positional argument after them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from node.config import ConfigError
from node.devices import MAX_DEVICES, device_named, devices_named
from node.runtime.console import one_line, put
from node.runtime.settings.file import Command, entries_for, read_document
from node.runtime.settings.flags import CONFIG_VARIABLE, Flag, at_home, command_of, flags_of
from node.runtime.settings.merge import PRECEDENCE, Setting, in_force, of_environment, of_file
from node.runtime.settings.origins import remember_origins
from node.runtime.settings.shown import COMMAND_LINE, DEFAULT, settings_text
from node.runtime.values import MAX_SECONDS, MAX_THREADS

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?(?:([KMGTP])(IB|B)?|B)?", re.IGNORECASE | re.ASCII)
_OPTIONS = frozenset({"--peers", "--listen", "--announce", "--relay"})


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


def command_first(words: Sequence[str], commands: Collection[str]) -> list[str]:
    """Put a command before the flags of the configuration that precede it: `--config FILE status`.

    argparse alone would take FILE or the command for something else.
    """
    before = 0
    while before < len(words) and words[before].partition("=")[0] in ("--config", "--print-config"):
        before += 2 if words[before] == "--config" else 1
    if before < len(words) and words[before] in commands:
        return [words[before], *words[:before], *words[before + 1 :]]
    return list(words)


Family = Callable[[], "Sequence[Parser]"]
"""The parsers of all commands of a program, made when somebody asks."""


class Parser(argparse.ArgumentParser):
    """argparse's parser for a command: flags have keys in a file and variables in the environment.

    Errors are harmless on a terminal for any argument.  A parser without subcommands takes `--config` and
    `--print-config` besides its own flags; a setting that is wrong is a ConfigError.

    family: the parsers of all commands of the program; a file may have keys of theirs.  None: this one alone,
    or those of the parser whose subcommand this is.
    """

    def __init__(
        self, *args: Any, family: Family | None = None, **kwargs: Any
    ) -> None:  # Any: the library's arguments
        super().__init__(*args, **kwargs)
        self.family = family
        self.one_of: Sequence[str] = ()  # flags of which one must be given
        self._before: list[tuple[argparse.Action, Any, bool]] = []  # while the words alone are read

    @property
    def command(self) -> Command:
        """The words that name the command: ("node", "status")."""
        return command_of(self)

    def commands(self) -> list[Parser]:
        """The parsers of the subcommands, or this one where it has none."""
        if self._subparsers is None:
            return [self]
        found: list[Parser] = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                # A subcommand without --help stands for a parser elsewhere.
                parsers: list[Parser] = [each for each in action.choices.values() if each.add_help]
                found += [each for parser in parsers for each in parser.commands()]
        return found

    def parse_known_args(  # type: ignore[override]  # the library has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the library's, with settings of the environment and a file in place of defaults.

        Raises ConfigError for a file that cannot be read and for a setting that is wrong.
        """
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None:
            for command in self.commands():
                command.family = command.family or self.family or self.commands
            names = [
                name
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
                for name in action.choices
            ]
            return super().parse_known_args(command_first(words, names), namespace)
        self._add_configuration()
        flags = flags_of(self)
        given, others = self._given(words)
        settings = self._settings(flags, given, os.environ)
        set_here = [flag for flag in flags if flag.action.dest in settings]
        remember_origins({flag.name: settings[flag.action.dest].origin for flag in set_here})
        if "print_config" in given:
            if others:
                self.error(f"unrecognized arguments: {' '.join(others)}")
            values = _in_force(flags, given, self._given(words, converted=False)[0], settings)
            put(settings_text(self.command, flags, values, list(os.environ)))
            self.exit()
        with self._defaults_from(settings):
            found, others = super().parse_known_args(words, namespace)
        if self.one_of and not any(getattr(found, name) for name in self.one_of):
            self.error(f"one of the arguments {' '.join('--' + name for name in self.one_of)} is required")
        return found, others

    def _add_configuration(self) -> None:
        if any("--config" in action.option_strings for action in self._actions):
            return
        group = self.add_argument_group("configuration", PRECEDENCE)
        group.add_argument(
            "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS,
            help=f"read flags from this file of TOML (default: {CONFIG_VARIABLE}, else none)",
        )  # fmt: skip
        group.add_argument(
            "--print-config", action="store_true", default=argparse.SUPPRESS,
            help="print the value of each flag and its origin, and do nothing else",
        )  # fmt: skip

    def _given(
        self, words: list[str], *, converted: bool = True
    ) -> tuple[dict[str, Any], list[str]]:  # Any: of the flags
        """What the words alone say, by `dest`, and the words that are no flags; not converted: as texts.

        Ends the process for wrong words, and after --help.
        """
        missing = object()
        defaults, self._defaults = self._defaults, {}
        self._before = [(action, action.default, action.required) for action in self._actions]
        groups = [(group, group.required) for group in self._mutually_exclusive_groups]
        types = [(action, action.type, action.choices) for action in self._actions]
        try:
            for action in self._actions if not converted else ():
                action.type = action.choices = None
            for action in self._actions:
                action.default = argparse.SUPPRESS if action.option_strings else missing
                action.required = False
            for group, _ in groups:
                group.required = False
            found, others = super().parse_known_args(words, argparse.Namespace())
        finally:
            self._restore()
            self._defaults = defaults
            for action, kind, choices in types:
                action.type, action.choices = kind, choices
            for group, required in groups:
                group.required = required
        return {dest: value for dest, value in vars(found).items() if value is not missing}, others

    def _restore(self) -> None:
        for action, default, required in self._before:
            action.default, action.required = default, required
        self._before = []

    def _settings(
        self,
        flags: Sequence[Flag],
        given: Mapping[str, Any],  # Any: the types of the flags
        environ: Mapping[str, str],
    ) -> dict[str, Setting]:
        """The settings of environment and file that hold, by `dest`.  Raises ConfigError."""
        sources = [of_environment(flags, environ)]
        path: Path | None = given.get("config")
        if path is None and (named := environ.get(CONFIG_VARIABLE)):
            path = Path(named)
        if path is not None:
            try:
                path = at_home(path)
            except ValueError as error:
                raise ConfigError(f"cannot read the configuration: {error}") from None
            family = self.family() if self.family is not None else [self]
            names = {
                parser.command: frozenset(flag.name for flag in flags_of(parser))
                for each in family
                for parser in each.commands()
            }
            names[self.command] = frozenset(flag.name for flag in flags)
            sources.append(of_file(flags, entries_for(read_document(path), path, self.command, names)))
        exclusive = [
            [action.dest for action in group._group_actions] for group in self._mutually_exclusive_groups
        ]
        return in_force(given, sources, exclusive)

    @contextmanager
    def _defaults_from(self, settings: Mapping[str, Setting]) -> Iterator[None]:
        """Put settings in the place of defaults; what they name needs no word any more."""
        self._before = [(action, action.default, action.required) for action in self._actions]
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        try:
            for action in self._actions:
                if action.dest in settings:
                    action.default, action.required = settings[action.dest].value, False
            for group in groups:
                group.required = not any(each.dest in settings for each in group._group_actions)
            yield
        finally:
            self._restore()
            for group in groups:
                group.required = True

    def format_help(self) -> str:
        """As the library's, with the configuration's flags."""
        if self._subparsers is None:
            self._add_configuration()
        before, self._before = self._before, [(each, each.default, each.required) for each in self._actions]
        for action, default, required in before:
            action.default, action.required = default, required
        try:
            return super().format_help()
        finally:
            self._restore()
            self._before = before

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print it.  Raises OutputError, which argparse would swallow."""
        if file is None:
            put(self.format_help())
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and end with code 2."""
        super().error(one_line(message))


def _in_force(
    flags: Sequence[Flag],
    given: Mapping[str, Any],  # Any: the types of the flags
    texts: Mapping[str, Any],
    settings: Mapping[str, Setting],
) -> dict[str, Setting]:
    """The value of every flag by `dest`, whatever its origin.  texts: of `given`."""
    found = {}
    for flag in flags:
        dest = flag.action.dest
        if dest in given:
            found[dest] = Setting(given[dest], COMMAND_LINE, texts[dest])
        else:
            found[dest] = settings.get(dest) or Setting(flag.action.default, DEFAULT)
    return found


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


def device(text: str) -> str:
    """A device's name, for argparse."""
    try:
        return device_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def devices(text: str) -> str:
    """A device's name or a list of them, for argparse."""
    try:
        return ",".join(devices_named(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def ranks(text: str) -> int:
    """A number of devices that divide each block, for argparse."""
    return positive(text, MAX_DEVICES)


def seconds(text: str) -> float:
    """A length of time, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{_brief(text)} is not 0 to {MAX_SECONDS:,.0f} seconds")
    return value


def size(text: str) -> int:
    """A number of bytes, for argparse: "20GiB" and "20G" are 20 * 2**30, "20GB" is 20 * 10**9."""
    found = _SIZE.fullmatch(text.strip())
    if found is not None:
        power = "KMGTP".index(found[2].upper()) + 1 if found[2] else 0
        count = float(found[1]) * (1000 if (found[3] or "").upper() == "B" else 1024) ** power
        if 1 <= count < 1 << 60:
            return int(count)
    raise argparse.ArgumentTypeError(
        f"{_brief(text)} is not a number of bytes of at least 1, as in 20GiB, 500MB or 1048576"
    )


def _brief(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def add_max_disk(parser: argparse._ActionsContainer) -> None:
    """Add the bound of the model cache; its value is bytes or None."""
    parser.add_argument(
        "--max-disk",
        type=size,
        metavar="SIZE",
        help="of all models in the cache together, as in 20GiB: those unused for longest make room, never one"
        " in use (default: no bound)",
    )


def add_ways_in(parser: Parser) -> None:
    """Add --peers and --lan, of which a program that serves nobody needs one: see `with_peers`."""
    add_addresses(parser, "--peers", help="nodes of the swarm")
    parser.add_argument(
        "--lan", action="store_true", help="without --peers: join the nodes found in the local network"
    )
    parser.one_of = ("peers", "lan")


def with_peers(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with the nodes found in the local network in `peers` where --lan stands in its place.

    Blocks for seconds where it looks.  Raises ConfigError.
    """
    if flags.peers or not flags.lan:
        return flags
    from node.network.lan.looking import find_peers

    return argparse.Namespace(**{**vars(flags), "peers": list(find_peers(flags.swarm_key))})


def add_addresses(
    parser: argparse._ActionsContainer, option: str, *, help: str, required: bool = False
) -> None:
    """Add an option that `one_address_each` has prepared; its value is a list, empty by default."""
    parser.add_argument(
        option, action="append", default=[], metavar="MULTIADDR ...", help=help, required=required
    )
