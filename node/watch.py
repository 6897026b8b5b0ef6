"""`python -m node status`, once or again and again: what a swarm can do, what limits it, and who moves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from node.config import NetworkConfig
from node.status import SETTLE_SECONDS, describe, tables
from routing.names import PeerId
from routing.records import Record

LOOK_SECONDS = 2.0  # between two looks
MOVES_KEPT = 20


@dataclass(slots=True)
class Moves:
    """Which peers have changed their blocks while somebody was watching."""

    count: int = 0
    last: list[dict[str, Any]] = field(default_factory=list)  # Any: JSON
    _spans: dict[PeerId, tuple[str, int, int]] = field(default_factory=dict)

    def look(self, records: Iterable[Record], seconds: float) -> None:
        """Take in the swarm of this moment.  seconds: since the watching began."""
        for record in records:
            if record.role != "serve" or record.state != "online":
                continue  # who announces a move may still think better of it
            span = record.revision, record.start, record.stop
            known = self._spans.get(record.peer, span)
            self._spans[record.peer] = span
            if known != span and known[0] == record.revision:
                self.count += 1
                move = {"peer": record.peer, "from": list(known[1:]), "to": list(span[1:])}
                self.last = [*self.last, {"seconds": round(seconds, 1), **move}][-MOVES_KEPT:]

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """As plain values."""
        return {"moves": self.count, "last_moves": self.last}


async def watch_status(config: NetworkConfig, *, as_json: bool, chains: int = 0) -> None:
    """Show the swarm every two seconds until interrupted: a table, or a line of JSON each time.

    chains: so many of each model.  Raises ConfigError.
    """
    from node.main import open_node

    moves = Moves()
    async with open_node(config, "client") as node:
        await trio.sleep(SETTLE_SECONDS)
        began = trio.current_time()
        with _screen(as_json) as show:
            while True:
                view = node.directory.view()
                moves.look(view.records(), trio.current_time() - began)
                await node.directory.measure([record.peer for record in view.records()], 1.0)
                show({**describe(view, dict(node.directory.rtts()), chains), **moves.facts()})
                await trio.sleep(LOOK_SECONDS)


@contextmanager
def _screen(as_json: bool) -> Iterator[Any]:  # Any: a function of JSON
    if as_json:
        yield lambda facts: print(json.dumps(facts), flush=True)
        return
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    if not console.is_terminal:  # a file or a pipe: one look below the other
        yield lambda facts: console.print(*tables(facts), *move_lines(facts), sep="\n")
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda facts: live.update(Group(*tables(facts), *move_lines(facts)), refresh=True)


def move_lines(facts: dict[str, Any], most: int = 5) -> Sequence[str]:  # Any: JSON
    """The moves that were seen, for people."""
    lines = [f"moves seen: {facts['moves']}"]
    for move in facts["last_moves"][-most:]:
        (a, b), (c, d) = move["from"], move["to"]
        lines.append(f"  after {move['seconds']:.0f} s: …{move['peer'][-6:]} from {a}:{b} to {c}:{d}")
    return lines
