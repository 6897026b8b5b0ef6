"""A rank other than 0: a process of its own that computes its shard of every step, as rank 0 says.

Started by `node.model.parallel.team` as `python -m node.model.parallel.worker FD`.  It decides nothing:
spans, page pools and rows are those of rank 0, made and dropped by its messages.  It ends when rank 0's
end of the pipe closes, whatever it is doing, and leaves signals of the terminal to rank 0.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from node.model.parallel import commands
from node.model.parallel.commands import Message, folder_of, packed, unpacked

FAILED = 1  # exit code after a failed step; the reason is the last line on standard error


def main() -> None:
    """Follow rank 0 until it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    first = messages.get()
    try:
        _follow(first, connection, messages)
    except Exception as error:  # noqa: BLE001  the end of this process is how rank 0 learns of it
        text = " ".join(str(error).split()) or "without a reason"
        sys.stderr.write(f"rank {first['rank']}: {type(error).__name__}: {text[:400]}\n")
        sys.stderr.flush()
        os._exit(FAILED)  # other threads of torch may wait for a rank for long


def _read(connection: Connection, messages: queue.SimpleQueue[Message]) -> None:
    """Take messages as they come, so that rank 0 never waits for this rank to read."""
    try:
        while True:
            messages.put(unpacked(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)  # rank 0 is gone, and a collective operation may wait for it


def _follow(first: Message, connection: Connection, messages: queue.SimpleQueue[Message]) -> None:
    import transformers.modeling_utils  # noqa: F401  the seconds of importing, before the ranks meet

    _use_threads(first)
    connection.send_bytes(packed({}))
    rank = _Rank(first, connection)
    while True:
        message = messages.get()
        rank.do[message["do"]](message)


def _use_threads(message: Message) -> None:
    """Of torch, from the next step on."""
    import torch

    torch.set_num_threads(message["threads"])


class _Rank:
    """This rank's spans, pools, rows and graphs, by the numbers that rank 0 has given them."""

    def __init__(self, first: Message, connection: Connection) -> None:
        import torch

        from node.model.parallel.group import join

        self.connection = connection
        self.device = torch.device(first["device"])
        self.group = join(first["rank"], first["ranks"], self.device, Path(first["meeting"]))
        connection.send_bytes(packed({}))  # from now on the meeting's file may go
        self.spans: dict[int, Any] = {}
        self.pools: dict[int, Any] = {}
        self.rows: dict[int, Any] = {}
        self.graphs: dict[int, Any] = {}
        self.do: dict[str, Callable[[Message], None]] = {
            commands.LOAD: self._load, commands.PART: self._part, commands.JOIN: self._join,
            commands.ARENA: self._arena, commands.HOLD: self._hold, commands.RECORD: self._record,
            commands.CUT: self._cut, commands.ORDER: self._order, commands.CLOSE: self._close,
            commands.FORWARD: self._forward, commands.DECODE: self._decode,
            commands.APART: self._apart, commands.BACK: self._back, commands.FORGET: self._forget,
            commands.ROOM: self._room, commands.THREADS: _use_threads,
        }  # fmt: skip

    def _load(self, message: Message) -> None:
        from node.config import ConfigError
        from node.devices import is_out_of_memory
        from node.model.blocks.span import DTYPES, load_span

        answer: Message = {}
        try:
            with self.group.alone():
                self.spans[message["span"]] = load_span(
                    folder_of(message["folder"]), *message["run"], dtype=DTYPES[message["dtype"]],
                    device=self.device, quantize=message["quantize"], group=self.group,
                )  # fmt: skip
        except (ConfigError, OSError, MemoryError, RuntimeError) as error:
            kind = "config" if isinstance(error, ConfigError) else "other"
            answer = {"kind": "memory" if is_out_of_memory(error) else kind, "why": str(error)}
        self.connection.send_bytes(packed(answer))

    def _part(self, message: Message) -> None:
        self.spans[message["span"]] = self.spans[message["of"]].part(*message["run"])

    def _join(self, message: Message) -> None:
        first, *others = (self.spans[each] for each in message["of"])
        self.spans[message["span"]] = first.joined(others)

    def _arena(self, message: Message) -> None:
        from node.model.blocks.span import DTYPES

        span = self.spans[message["span"]]
        self.pools[message["pool"]] = span.new_arena(
            message["tokens"], message["max_length"], DTYPES[message["dtype"]]
        )

    def _hold(self, message: Message) -> None:
        start, stop = message["run"]
        known = {
            block: shape
            for span in self.spans.values()
            for block, shape in enumerate(span.shapes, span.start)
        }
        self.pools[message["pool"]].hold(start, [known[block] for block in range(start, stop)])

    def _record(self, message: Message) -> None:
        self.spans[message["span"]].record(self.pools[message["pool"]])

    def _cache(self, described: list[int]) -> Any:
        """The rows of a session, as long as they are at rank 0; made at their first step."""
        number, pool, batch, max_length, length = described
        if number not in self.rows:
            self.rows[number] = self.pools[pool].open(batch, max_length)
        cache = self.rows[number]
        cache.length = length
        return cache

    def _cut(self, message: Message) -> None:
        self._cache(message["cache"]).cut(message["to"])

    def _order(self, message: Message) -> None:
        self._cache(message["cache"]).select(message["rows"])

    def _close(self, message: Message) -> None:
        if (cache := self.rows.pop(message["cache"], None)) is not None:
            cache.close()

    def _given(self, span: Any, shape: list[int]) -> Any:
        """Hidden states of this shape, from rank 0."""
        import torch

        return self.group.from_first(torch.empty(shape, dtype=span.dtype, device=self.device))

    def _forward(self, message: Message) -> None:
        span, cache = self.spans[message["span"]], self._cache(message["cache"])
        hidden = self._given(span, message["shape"])
        prompts = self._given(span, message["prompts"]) if message["prompts"] else None
        span.forward(
            hidden, cache, cache.length, *message["run"], rope_length=message["rope"], prompts=prompts
        )

    def _decode(self, message: Message) -> None:
        span, caches = self.spans[message["span"]], [self._cache(each) for each in message["caches"]]
        tokens = message["tokens"]
        for cache, count in zip(caches, tokens or [1] * len(caches), strict=True):
            cache.reserve(cache.length + count)
        hidden = self._given(span, message["shape"])
        span.decode(hidden, caches, *message["run"], rope_lengths=message["ropes"], tokens=tokens)

    def _apart(self, message: Message) -> None:
        import torch

        from node.model.blocks.forward_backward import through

        span = self.spans[message["span"]]
        hidden = self._given(span, message["shape"])
        if message["graph"] is None:
            with torch.inference_mode():
                through(span, hidden, *message["run"])
            return
        leaf = hidden.requires_grad_()
        self.graphs[message["graph"]] = leaf, through(span, leaf, *message["run"])

    def _back(self, message: Message) -> None:
        import torch

        leaf, output = self.graphs.pop(message["graph"])
        gradient = self.group.from_first(torch.empty_like(output))
        torch.autograd.grad(output, leaf, gradient)

    def _forget(self, message: Message) -> None:
        number = message["number"]
        if message["kind"] == "pool":
            pool = self.pools.pop(number)
            self.rows = {each: cache for each, cache in self.rows.items() if cache.pool is not pool}
        else:
            {"span": self.spans, "graph": self.graphs}[message["kind"]].pop(number, None)

    def _room(self, _: Message) -> None:
        import gc

        from node.devices import empty_cache, free_device_bytes

        gc.collect()
        free = 0
        if self.device.type == "cuda":
            empty_cache()
            free = free_device_bytes(self.device)
        self.connection.send_bytes(packed({"free": free}))


if __name__ == "__main__":
    main()
