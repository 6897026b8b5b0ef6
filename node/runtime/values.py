"""Arguments from Python, checked on the call: what was found and what is allowed, in one line.

Numbers of numpy and torch are numbers here too.  True is none, and nothing is rounded.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_SECONDS = 1e6
MAX_THREADS = 1024
MAX_TOKENS = 1 << 40


def whole(name: str, value: Any, least: int = 1, most: int = MAX_TOKENS) -> int:  # Any: to be checked
    """A whole number.  Raises ValueError."""
    try:
        found = None if is_bool(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch: a tensor of fractions, or of many numbers
        found = None
    if found is None or not least <= found <= most:
        upper = f" and at most {most}" if most < MAX_TOKENS else ""
        raise ValueError(f"{name} is {shown(value)}, a whole number of at least {least}{upper} is needed")
    return found


def seconds(name: str, value: Any, *, above: bool = False) -> float:  # Any: to be checked
    """A length of time.  above: 0 is not allowed.  Raises ValueError."""
    try:
        found = math.nan if isinstance(value, str | bytes) or is_bool(value) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not 0 <= found <= MAX_SECONDS or (above and not found):
        low = "above 0 and at most" if above else "0 to"
        raise ValueError(f"{name} is {shown(value)}, {low} {MAX_SECONDS:,.0f} seconds are allowed")
    return found


def path(name: str, value: Any) -> Path:  # Any: to be checked
    """A file or a folder.  Raises ValueError."""
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(found, str) or not found or "\0" in found:
        raise ValueError(f"{name} is {shown(value)}, a path is needed")
    return Path(found)


def texts(name: str, values: Any, what: str) -> tuple[str, ...]:  # Any: to be checked
    """A collection of texts; one alone is one of them.  Raises ValueError."""
    if isinstance(values, str):
        return (values,)
    if isinstance(values, bytes | bytearray) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {shown(values)}, a list of {what} is needed")
    found = tuple(values)
    for each in found:
        if not isinstance(each, str):
            raise ValueError(f"{name} holds {shown(each)}, {what} are needed")
    return found


def shown(value: object) -> str:
    """A value for people: its kind too where it is no plain number or text, and never much of it."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else text[:60] + "..."
    plain = value is None or isinstance(value, bool | int | float | str)
    return text if plain else f"{text} ({type(value).__name__})"


def is_bool(value: Any) -> bool:  # Any: to be checked
    """Whether it is True or False, of numpy and torch too."""
    if isinstance(value, bool):
        return True
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
