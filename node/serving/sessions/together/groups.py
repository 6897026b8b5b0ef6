"""Which of many steps, or results, share a frame.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tensor_codec.limits import KIB
from tensor_codec.messages.session import Result, Step
from tensor_codec.messages.steps import bytes_of, comes_with_others, travels_with_others

T = TypeVar("T")

FRAME_BYTES = 60 * KIB  # goes out in one piece of the muxer, and is read like the frame of a token


def grouped(items: Iterable[T], message_of: Callable[[T], Step | Result], most: int) -> Iterator[list[T]]:
    """`items` in groups, each for one frame, in the order of their first items.

    message_of: of an item.  most: items of a group.  The messages of a group take at most FRAME_BYTES and
    passed equally many hops; one that cannot travel with others is alone.
    """
    open_groups: dict[int, tuple[list[T], int]] = {}
    groups: list[list[T]] = []
    for item in items:
        message = message_of(item)
        shares = travels_with_others(message) if isinstance(message, Step) else comes_with_others(message)
        if not shares:
            groups.append([item])
            continue
        size, hops = bytes_of(message), len(message.timings)
        group, held = open_groups.get(hops, ([], 0))
        if not group or len(group) == most or held + size > FRAME_BYTES:
            group, held = [], 0
            groups.append(group)
        group.append(item)
        open_groups[hops] = group, held + size
    return iter(groups)
