"""Orders of rows: the row of a session's batch that each row continues from now on.

An order `rows` has an item for each of the batch's rows: row i becomes the former row rows[i].  A row may be
named more than once, and then some other row is dropped.  Beam search orders rows at each step.
On the wire: 2 bytes a row, big-endian.
"""

from __future__ import annotations

import struct
from typing import Any

from tensor_codec.errors import MessageError

MAX_ORDERED_ROWS = 1024  # an order travels in a header
ROW_BYTES = 2


def row_order(rows: Any, batch: int) -> tuple[int, ...]:  # Any: to be checked
    """A caller's order of `batch` rows; empty where every row stays.  Raises ValueError."""
    if hasattr(rows, "tolist"):  # of numpy or torch
        rows = rows.tolist()
    order = tuple(rows) if isinstance(rows, list | tuple | range) else None
    if order is None or any(type(row) is not int for row in order):
        raise ValueError(f"rows is a {type(rows).__name__}, a list of {batch} whole numbers is needed")
    if len(order) != batch or not all(0 <= row < batch for row in order):
        raise ValueError(f"rows is {list(order)}"[:80] + f", {batch} numbers in 0..{batch - 1} are needed")
    if batch > MAX_ORDERED_ROWS:
        raise ValueError(f"{batch} rows are to be ordered, {MAX_ORDERED_ROWS} at most can be")
    return () if order == tuple(range(batch)) else order


def encode_rows(order: tuple[int, ...]) -> bytes:
    """An order as bytes."""
    return struct.pack(f">{len(order)}H", *order)


def decode_rows(data: bytes) -> tuple[int, ...]:
    """An order from an even number of bytes, one for as many rows as it has items.  Raises MessageError."""
    order = struct.unpack(f">{len(data) // ROW_BYTES}H", data)
    if max(order) >= len(order):
        raise MessageError(f"row {max(order)} in an order of rows, 0..{len(order) - 1} are allowed")
    return order
