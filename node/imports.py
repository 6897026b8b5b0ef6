"""Imports of a program's start without collections of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Within it nothing is collected, and later collections do not visit what it leaves.

    Half a million objects come with torch, and nearly all stay: collections on the way were a fifth
    of a start's CPU time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
