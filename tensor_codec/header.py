"""Message headers: a small msgpack map in front of raw bytes, read with suspicion.

A message is a 2-byte big-endian header length, a msgpack map with text keys (at most 4 KiB), and a
body of raw bytes.  Tensors are bodies, never msgpack: 1 MiB of msgpack can become 72 MiB of
objects, and extension types have crashed decoders that recurse through `ext_hook`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from reprlib import Repr
from typing import Any, NoReturn

import msgpack

from tensor_codec.errors import LocalProtocolError, MessageError
from tensor_codec.frame import Buffer
from tensor_codec.limits import MAX_HEADER_BYTES

_LENGTH = struct.Struct(">H")
_SHORT = Repr()  # of values that are nested to any depth
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = _SHORT.maxlist = _SHORT.maxdict = MAX_HEADER_BYTES
MAX_ITEMS = 64  # of one list or map: msgpack allocates as many as are announced, at every depth


def pack_header(fields: Mapping[str, object]) -> bytes:
    """Return the length and the msgpack of `fields`.  LocalProtocolError above 4 KiB."""
    packed = msgpack.packb(fields)
    if len(packed) > MAX_HEADER_BYTES:
        raise LocalProtocolError(f"a header of {len(packed)} bytes, where {MAX_HEADER_BYTES} are allowed")
    return _LENGTH.pack(len(packed)) + bytes(packed)


def split_message(frame: Buffer, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[Header, memoryview]:
    """Split a frame's payload into its header and its body (a view, nothing is copied).

    Raises MessageError.
    """
    view = memoryview(frame)
    if len(view) < _LENGTH.size:
        raise MessageError(f"a message of {len(view)} bytes has no header")
    size = _LENGTH.unpack_from(view)[0]
    if size > max_header_bytes:
        raise MessageError(f"a header of {size} bytes, {max_header_bytes} are allowed")
    if size > len(view) - _LENGTH.size:
        raise MessageError(f"a header of {size} bytes in a message of {len(view)}")
    return Header(unpack_map(view[_LENGTH.size : _LENGTH.size + size])), view[_LENGTH.size + size :]


def unpack_map(data: Buffer) -> dict[str, Any]:  # Any: each value is checked by Header's readers
    """Read one msgpack map with text keys, no duplicate keys and no extension types.

    Raises MessageError, whatever the bytes are.
    """
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            ext_hook=_refuse_extension,
            object_pairs_hook=_unique_pairs,
        )
    except MessageError:
        raise
    # msgpack raises ValueError and its children, and TypeError for keys that cannot be hashed
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MessageError(f"the header is not msgpack: {type(error).__name__}: {error}"[:200]) from None
    if not isinstance(value, dict):
        raise MessageError(f"the header is a {type(value).__name__}, not a map")
    return value


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise MessageError(f"msgpack extension type {code}")


def _unique_pairs(pairs: list[tuple[object, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise MessageError(f"a key that is a {type(key).__name__}, not text")
        if key in result:
            raise MessageError(f"the key {key[:40]!r} stands twice")
        result[key] = value
    return result


class Header:
    """A header whose fields are taken out by name, each with its type and its range checked.

    Every reader raises MessageError that says what was found and what was allowed.  Keys without a reader
    are ignored: a later version may add some.  absent: the value of a field that may be missing.
    fields: as they came, unchecked.
    """

    __slots__ = ("_fields", "fields", "names")

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = self.fields = fields
        self.names = fields.keys()

    def __contains__(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def integer(self, name: str, low: int, high: int, *, absent: int | None = None) -> int:
        """The integer `name`, low <= value <= high (a bool is not an integer)."""
        value = self._fields.get(name)
        if value is None and absent is not None:
            return absent
        if type(value) is not int or not low <= value <= high:
            raise MessageError(f"{name} is {_brief(value)}, an integer in {low}..{high} is allowed")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """The finite number `name`, low <= value <= high."""
        value = self._fields.get(name)
        if type(value) is int:
            value = float(value)
        if type(value) is not float or not math.isfinite(value) or not low <= value <= high:
            raise MessageError(f"{name} is {_brief(value)}, a number in {low}..{high} is allowed")
        return value

    def flag(self, name: str, *, absent: bool | None = None) -> bool:
        """The boolean `name`."""
        value = self._fields.get(name)
        if value is None and absent is not None:
            return absent
        if type(value) is not bool:
            raise MessageError(f"{name} is {_brief(value)}, true or false is allowed")
        return value

    def text(self, name: str, max_characters: int = 256, *, empty: bool = False) -> str:
        """The printable text `name`, of at most `max_characters`; empty: it may be."""
        value = self._fields.get(name)
        if (
            type(value) is not str
            or len(value) > max_characters
            or not (value or empty)
            or not value.isprintable()
        ):
            raise MessageError(
                f"{name} is {_brief(value)}, printable text of at most {max_characters} is allowed"
            )
        return value

    def choice(self, name: str, allowed: frozenset[str]) -> str:
        """The text `name`, one of `allowed`."""
        value = self._fields.get(name)
        if type(value) is not str or value not in allowed:
            raise MessageError(f"{name} is {_brief(value)}, one of {', '.join(sorted(allowed))} is allowed")
        return value

    def binary(self, name: str, size: int) -> bytes:
        """The bytes `name`, exactly `size` of them."""
        value = self._fields.get(name)
        if type(value) is not bytes or len(value) != size:
            raise MessageError(f"{name} is {_brief(value)}, {size} bytes are allowed")
        return value

    def short_binary(self, name: str, most: int) -> bytes:
        """The bytes `name`, 1 to `most` of them."""
        value = self._fields.get(name)
        if type(value) is not bytes or not 0 < len(value) <= most:
            raise MessageError(f"{name} is {_brief(value)}, 1..{most} bytes are allowed")
        return value

    def items(self, name: str, max_items: int, *, absent: bool = False) -> list[Any]:  # Any: not checked
        """The list `name`, of at most `max_items`; the caller checks the items.  absent: then it is empty."""
        value = self._fields.get(name)
        if value is None and absent:
            return []
        if type(value) is not list or len(value) > max_items:
            raise MessageError(f"{name} is {_brief(value)}, a list of at most {max_items} is allowed")
        return value

    def mapping(self, name: str, max_items: int) -> dict[str, Any]:  # Any: not checked
        """The map `name`, of at most `max_items` entries with text keys; the caller checks the values."""
        value = self._fields.get(name)
        if type(value) is not dict or len(value) > max_items:
            raise MessageError(f"{name} is {_brief(value)}, a map of at most {max_items} is allowed")
        return value


def _brief(value: object) -> str:
    """A value of a peer in a few words; plain `repr` of a deeply nested value raises RecursionError."""
    if isinstance(value, bytes | str | list | dict) and len(value) > 40:
        return f"{type(value).__name__} of {len(value)}"
    return _SHORT.repr(value)[:80]
