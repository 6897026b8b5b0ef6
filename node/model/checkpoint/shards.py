"""Writes safetensors files, a tensor at a time, so that no more than one is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ALIGNMENT = 64  # a cache line, and the width of an AVX-512 register


class Entry(NamedTuple):
    """One tensor of a file: its dtype by safetensors' name, its shape and its bytes."""

    dtype: str
    shape: Sequence[int]
    nbytes: int


def write_file(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Iterable[memoryview],
    *,
    metadata: Mapping[str, str] | None = None,
    written: Callable[[int], None] = lambda _: None,
) -> str:
    """Write one safetensors file; its SHA-256.  Raises OSError.

    tensors: the values of the entries, in their order.  written: called with the bytes of each tensor.
    The header is padded with blanks, which the format allows, so that each tensor whose predecessors have a
    multiple of ALIGNMENT bytes begins at one.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, nbytes) in entries.items():
        begin, end = end, end + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for values in tensors:
            file.write(values)
            digest.update(values)
            written(values.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
