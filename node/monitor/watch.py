"""`python -m node status`, once or again and again: throughput, bottleneck and moves of a swarm."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from node.config import NetworkConfig
from node.monitor.status import ASK_SECONDS, SETTLE_SECONDS, direct_peers, tables, wide_console
from node.runtime.console import put_line
from routing.names import PeerId
from routing.view.description import describe, worth_asking
from routing.view.records import Record

LOOK_SECONDS = 2.0  # between two looks
MOVES_KEPT = 20


class Moving(NamedTuple):
    """A server on its way from `old` blocks to `new` ones."""

    peer: PeerId
    old: tuple[int, int]
    new: tuple[int, int]


def _going(record: Record) -> tuple[int, int]:
    return (record.next_start, record.next_stop) if record.moves else (record.start, record.stop)


@dataclass(slots=True)
class Changes:
    """The servers that have come, gone, or changed their blocks during the watch.

    moving: servers about to change their blocks, with the old and the new blocks.
    """

    joined: int = 0
    left: int = 0
    moves: int = 0
    moving: tuple[Moving, ...] = ()
    last_moves: list[dict[str, Any]] = field(default_factory=list)  # Any: JSON
    _spans: dict[PeerId, tuple[str, int, int]] | None = None  # of online servers; None before the first look

    def look(self, records: Iterable[Record], seconds: float) -> None:
        """Take in the swarm's present state.  seconds: since the watch began."""
        servers = {record.peer: record for record in records if record.role == "serve"}
        first, spans = self._spans is None, self._spans or {}
        gone = [peer for peer in spans if peer not in servers]
        self.left += len(gone)
        self.moving = tuple(
            Moving(peer, (spans[peer][1], spans[peer][2]), _going(record))
            for peer, record in servers.items()
            if peer in spans and (record.moves or record.state == "joining")
        )
        self._spans = {peer: span for peer, span in spans.items() if peer in servers}
        for peer, record in servers.items():
            if record.state != "online" or (record.moves and peer in spans):
                continue  # an announced move may still be dropped
            span = record.revision, record.start, record.stop
            known = spans.get(peer)
            self._spans[peer] = span
            if known is None:
                self.joined += not first
            elif known != span and known[0] == record.revision:
                self.moves += 1
                move = {"peer": peer, "from": list(known[1:]), "to": list(span[1:])}
                self.last_moves = [*self.last_moves, {"seconds": round(seconds, 1), **move}][-MOVES_KEPT:]

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """As plain values."""
        return {
            "joined": self.joined,
            "left": self.left,
            "moves": self.moves,
            "moving": [
                {"peer": each.peer, "from": list(each.old), "to": list(each.new)} for each in self.moving
            ],
            "last_moves": self.last_moves,
        }


async def watch_status(config: NetworkConfig, *, as_json: bool, chains: int = 0) -> None:
    """Show the swarm every two seconds until interrupted: a table, or a line of JSON each time.

    chains: how many to show for each model.  Raises ConfigError.
    """
    from node.main import open_node

    changes = Changes()
    async with open_node(config, "client") as node:
        await trio.sleep(SETTLE_SECONDS)
        began, pings = trio.current_time(), node.directory.pings
        pings.monitor(math.inf, tuple)
        with _screen(as_json) as show:
            while True:
                asked = worth_asking(node.directory.view(), node.host.peer_id)
                await node.directory.measure(asked, ASK_SECONDS)
                view, seconds = node.directory.view(), trio.current_time() - began
                changes.look(view.records(), seconds)
                liveness = pings.liveness([record.peer for record in view.records()])
                rtts, direct = node.directory.rtts(), direct_peers(node)
                facts = describe(view, rtts, chains, liveness=liveness, direct=direct)
                show({"seconds": round(seconds, 1), **facts, **changes.facts()})
                await trio.sleep(LOOK_SECONDS)


@contextmanager
def _screen(as_json: bool) -> Iterator[Any]:  # Any: a function of JSON
    if as_json:
        yield lambda facts: put_line(json.dumps(facts))
        return
    from rich.console import Group
    from rich.live import Live

    console = wide_console()
    if not console.is_terminal or console.is_dumb_terminal:  # a file, a pipe: one look after the other
        yield lambda facts: console.print(*tables(facts), *change_lines(facts), sep="\n", soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda facts: live.update(Group(*tables(facts), *change_lines(facts)), refresh=True)


def change_lines(facts: dict[str, Any], most: int = 5) -> Sequence[str]:  # Any: JSON
    """The events, for people."""
    moving = ", ".join(
        "…{} {}:{} -> {}:{}".format(each["peer"][-6:], *each["from"], *each["to"]) for each in facts["moving"]
    )
    lines = [
        f"in {facts['seconds']:.0f} s: {facts['joined']} joined, {facts['left']} left, {facts['moves']} moved"
        + (f"; moving now: {moving}" if moving else "")
    ]
    for move in facts["last_moves"][-most:]:
        (a, b), (c, d) = move["from"], move["to"]
        lines.append(f"  after {move['seconds']:.0f} s: …{move['peer'][-6:]} from {a}:{b} to {c}:{d}")
    return lines
