"""The settings in force, as a file of TOML with the origin of each value; no secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from node.runtime.settings.file import Command
from node.runtime.settings.flags import CONFIG_VARIABLE, PREFIX, Flag
from node.runtime.settings.merge import PRECEDENCE, Setting

COMMAND_LINE, DEFAULT = "command line", "default"
OTHER_VARIABLES = (CONFIG_VARIABLE, PREFIX + "CACHE", PREFIX + "TORCH", PREFIX + "NO_APT")
HIDDEN = "(hidden)"
_SECRET = re.compile(r"(^|-)(key|token|secret|password|passphrase)s?$")
_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")


def settings_text(
    command: Command,
    flags: Sequence[Flag],
    values: Mapping[str, Setting],
    variables: Sequence[str] = (),
) -> str:
    """TOML of the values by `dest`, which name all flags; defaults are comments.

    variables: names in the environment.  Those that look like a flag's and are none are mentioned.
    Texts that are secret by the name of their flag are hidden, and logins in URLs; paths are shown.
    """
    lines = [f"# python -m {' '.join(command)}", f"# {PRECEDENCE}", f"[{'.'.join(command)}]"]
    for flag in flags:
        setting = values[flag.action.dest]
        text = _toml(_hidden(flag.name, _plain_value(flag.as_written(setting.value), setting.words)))
        shown = f"{flag.name} =" if text is None else f"{flag.name} = {text}"
        comment = "# " if text is None or setting.origin == DEFAULT else ""
        lines.append(f"{comment}{shown}  # {_plain(setting.origin)}")
    known = {name for flag in flags for name in flag.variables} | set(OTHER_VARIABLES)
    lines += [
        f"# {_plain(name)} is set, which is no flag of this command"
        for name in sorted(variables)
        if name.startswith(PREFIX) and name not in known
    ]
    return "\n".join(lines) + "\n"


def _plain_value(value: Any, words: Any) -> Any:  # Any: the type of the flag; of TOML
    """The value in types of TOML: numbers and texts as they are, others as they were written."""
    if type(value) is list:
        each = words if isinstance(words, list) and len(words) == len(value) else [None] * len(value)
        return [_plain_value(*pair) for pair in zip(value, each, strict=True)]
    if value is None or isinstance(value, str | int | float | PurePath):
        return value
    return str(value if words is None else words)


def _hidden(name: str, value: Any) -> Any:  # Any: the type of the flag
    if isinstance(value, list):
        return [_hidden(name, each) for each in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if _SECRET.search(name) else _LOGIN.sub(f"{HIDDEN}@", value)


def _toml(value: Any) -> str | None:  # Any: the type of the flag
    """A value of TOML; None for None and for an empty list."""
    if value is None or value == []:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml(each) or '' for each in value)}]"
    # JSON's escapes are TOML's too; lone surrogates, which TOML forbids, are bytes of a command line.
    text = str(value).encode("utf-8", "replace").decode()
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _plain(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)
