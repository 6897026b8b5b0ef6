"""The messages from rank 0 to the other ranks: what to load, and which step over which rows comes next.

They are small, msgpack in the frames of a pipe.  Hidden states do not go this way: ranks broadcast them.
A rank answers only `load`, with nothing or with the reason why it could not, and `room`; after any other
failure it ends, and rank 0 sees that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from node.model.checkpoint.folder import ModelFolder, TensorEntry
from node.model.checkpoint.tensors import block_tensors

Message = dict[str, Any]  # Any: whole numbers, texts, and lists of them

START = "start"  # the first message: rank, ranks, device, threads, meeting
LOAD = "load"  # blocks of a model become a span
PART, JOIN = "part", "join"  # a span out of one or of several
ARENA, HOLD = "arena", "hold"  # page pools
CUT, ORDER, CLOSE = "cut", "order", "close"  # of a session's rows
FORWARD, DECODE = "forward", "decode"  # steps of sessions
APART, BACK = "apart", "back"  # blocks on whole rows, and back through them
FORGET = "forget"  # a span, a pool or a graph that nobody uses any more
RECORD = "record"  # CUDA graphs at start
ROOM = "room"  # give unused memory back, and say how much is free
THREADS = "threads"  # of torch, from the next step on


def packed(message: Mapping[str, Any]) -> bytes:
    """A message's bytes."""
    return bytes(msgpack.packb(message))


def unpacked(data: bytes) -> Message:
    """A message of this program's own processes."""
    found = msgpack.unpackb(data, strict_map_key=False)
    assert isinstance(found, dict)
    return found


def folder_message(folder: ModelFolder, start: int, stop: int) -> Message:
    """A model's folder, with the tensors of these blocks: for a rank of this machine, which has its files."""
    entries = {name: folder.tensors[name] for name in block_tensors(folder, start, stop)}
    return {
        "path": str(folder.path), "name": folder.name, "revision": folder.revision,
        "config": dict(folder.config),
        "tensors": {name: [each.file, each.dtype, list(each.shape)] for name, each in entries.items()},
    }  # fmt: skip


def folder_of(message: Message) -> ModelFolder:
    """The folder of a `folder_message`."""
    from pathlib import Path

    tensors = {
        name: TensorEntry(file, dtype, tuple(shape))
        for name, (file, dtype, shape) in message["tensors"].items()
    }
    return ModelFolder(
        Path(message["path"]), message["name"], message["revision"], message["config"], tensors
    )
