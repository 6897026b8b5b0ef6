"""Values that a program hands over, checked on the call: numbers, switches, paths, texts, collections.

Numbers of numpy and torch are numbers here too.  True is no number, and nothing is rounded.  A value of
another kind or outside its range is a ValueError that names the found and the allowed value.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_SECONDS = 1e6
MAX_THREADS = 1024
MAX_TOKENS = 1 << 40
MAX_BYTES = 1 << 60
MAX_INT32 = 2**31 - 1  # a bound from here on is not mentioned


class Range(NamedTuple):
    """Numbers that are allowed.  above: `low` itself is not.  whole: no fractions."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:g} and at most {self.high:g} is allowed"
        if not self.whole:
            return f"{self.low:g} to {self.high:g} is allowed"
        if self.high >= 1 << 63:
            return "a whole number of 64 bits is allowed"
        lower = f" of at least {self.low}" if self.low >= 0 else ""
        upper = f" and at most {self.high}" if self.high < MAX_INT32 else ""
        return f"a whole number{lower}{upper} is needed"


def number(name: str, value: Any, allowed: Range) -> float:  # Any: to be checked
    """A float, or an int where `allowed` says whole.  Raises ValueError."""
    found = _number(value, whole=allowed.whole)
    if found is None or not allowed.low <= found <= allowed.high or (allowed.above and found == allowed.low):
        raise ValueError(f"{name} is {shown(value)}, {allowed}")
    return found


def whole(name: str, value: Any, low: int = 1, high: int = MAX_TOKENS) -> int:  # Any: to be checked
    """A whole number from `low` to `high`.  Raises ValueError."""
    return int(number(name, value, Range(low, high, whole=True)))


def seconds(name: str, value: Any, *, above: bool = False) -> float:  # Any: to be checked
    """A length of time.  above: 0 is not allowed.  Raises ValueError."""
    found = _number(value, whole=False)
    if found is None or not 0 <= found <= MAX_SECONDS or (above and not found):
        low = "above 0 and at most" if above else "0 to"
        raise ValueError(f"{name} is {shown(value)}, {low} {MAX_SECONDS:,.0f} seconds are allowed")
    return found


def switch(name: str, value: Any) -> bool:  # Any: to be checked
    """True or False, of numpy and torch too.  Raises ValueError."""
    if not is_bool(value) or _has_axes(value):
        raise ValueError(f"{name} is {shown(value)}, True or False is allowed")
    return bool(value)


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
    """A value for people, shortened; with its kind where it is no plain number or text."""
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else text[:60] + "..."
    plain = value is None or isinstance(value, bool | int | float | str)
    return text if plain else f"{text} ({type(value).__name__})"


def is_bool(value: Any) -> bool:  # Any: to be checked
    """Whether it is True or False, of numpy and torch too."""
    if isinstance(value, bool):
        return True
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def items_of(value: Any) -> list[Any] | None:  # Any: to be checked
    """The items of a list, tuple, set, array or tensor; None for anything else."""
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of numpy or torch; its items are Python's
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return None
    return list(value)


def _number(value: Any, *, whole: bool) -> float | None:
    """The number that `value` is; None for anything else, a fraction included where it must be whole."""
    if isinstance(value, str | bytes | complex) or is_bool(value) or _has_axes(value):
        return None
    try:
        return operator.index(value) if whole else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch's, for many numbers
        return None


def _has_axes(value: Any) -> bool:
    """Whether it is an array or a tensor of more than a number."""
    return bool(getattr(value, "ndim", None))
