"""The events between two views of a swarm: peers that came, went, moved, fell silent or answer again.

    for change in peer_changes(before, after): ...

A server appears with its first record, while it still loads its blocks; `joined` says so once.  A record
that is renewed, or whose rates have changed, is no event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from routing.names import PeerId
from routing.view.records import Record
from routing.view.view import SwarmView

What = Literal["joined", "left", "moved", "silent", "back"]


@dataclass(frozen=True, slots=True)
class PeerChange:
    """One event of one peer.

    name: as the peer gives it, a stranger's text.  blocks: that it serves, [start, stop); of one that left
    its last ones; None for a peer that serves nothing.
    """

    peer: PeerId
    name: str
    what: What
    blocks: tuple[int, int] | None


def peer_changes(before: SwarmView, after: SwarmView) -> list[PeerChange]:
    """The events from one view to the next, in the order of the peers' ids; clients are left out.

    A peer may have two: it has moved, and answers again.  O(peers).
    """
    if before is after:
        return []
    old, new = _present(before), _present(after)
    found = [_change(record, "left") for peer, record in old.items() if peer not in new]
    for peer, record in new.items():
        known = old.get(peer)
        if known is None:
            found.append(_change(record, "joined"))
        elif _place(known) != _place(record):
            found.append(_change(record, "moved"))
        was, is_now = known is not None and peer in before.silent, peer in after.silent
        if was != is_now:
            found.append(_change(record, "silent" if is_now else "back"))
    return sorted(found, key=lambda change: change.peer)


def _present(view: SwarmView) -> dict[PeerId, Record]:
    return {record.peer: record for record in view.records() if record.role != "client"}


def _place(record: Record) -> tuple[str, int, int] | None:
    return (record.revision, record.start, record.stop) if record.role == "serve" else None


def _change(record: Record, what: What) -> PeerChange:
    blocks = (record.start, record.stop) if record.role == "serve" else None
    return PeerChange(record.peer, record.name, what, blocks)
