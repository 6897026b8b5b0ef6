"""Memory or a device that ends while the node computes: what asked for it is refused.

Torch finds out while it computes, whatever was counted beforehand: another program may have taken a GPU's
memory.  A step is refused with `cache_full`: its cache is as it was before, so its session goes on, here or
elsewhere.  A session whose cache is of no use afterwards ends with `too_many`, and so does a request.  The
node lives on.

A device that shares every block with others takes the whole span with it: the node is about to leave, and
says so to all (`draining`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from node.devices import empty_cache, is_out_of_memory
from node.model.parallel.lost import SpanLost
from tensor_codec.errors import CacheFull, Draining, Refused, TooManyStreams

P = ParamSpec("P")
T = TypeVar("T")

FAULTS = (RuntimeError, MemoryError)  # those that may say so, see `is_out_of_memory`
LEAST_TOKENS = 16  # of a row, in the pieces of a chunk that is computed again: less needs hardly less memory


class OutOfMemory(TooManyStreams):
    """Memory ended while this was computed; what it held is of no use."""


def refusal(what: str, seconds: float, *, cache_is_whole: bool) -> Refused:
    """The answer to a step or a request.  seconds: until asking again may help.

    cache_is_whole: it is as it was before the step.
    """
    kind = CacheFull if cache_is_whole else OutOfMemory
    return kind(f"this node has no memory to compute {what} now", seconds)


def span_lost() -> Draining:
    """The answer to everything once the span cannot compute any more."""
    return Draining("this node has lost a device and leaves")


def or_refused(function: Callable[P, T], what: str, seconds: float) -> Callable[P, T]:
    """A function for the torch thread that raises OutOfMemory where torch finds no memory, Draining where the
    span is lost.

    what: for the peer.  seconds: until asking again may help.
    """

    def call(*args: P.args, **arguments: P.kwargs) -> T:
        try:
            return function(*args, **arguments)
        except FAULTS as error:
            if not is_out_of_memory(error):
                raise
        except SpanLost:
            raise span_lost() from None
        empty_cache()  # the error is gone, and with it all that the function held
        raise OutOfMemory(f"this node has no memory for {what} now", seconds)

    return call
