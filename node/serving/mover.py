"""The methods of a server that the balancer uses to move it."""

from __future__ import annotations

from typing import Protocol

from routing.blocks import Blocks
from routing.view.records import Record
from routing.view.view import SwarmView


class MoveFailed(Exception):
    """The new blocks could not be loaded, and the old ones are served again."""


class Mover(Protocol):
    """A node that serves blocks and can be moved to others: `node.serving.server.Server`."""

    def view(self) -> SwarmView:
        """The swarm as known now."""

    def record(self) -> Record:
        """The node's record while it serves: peer, revision, blocks, start, stop."""

    async def announce_move(self, blocks: Blocks) -> None:
        """Say that the node is about to serve these blocks."""

    async def stay(self) -> None:
        """Announce that the node keeps its blocks."""

    async def move(self, blocks: Blocks) -> None:
        """Let the sessions move elsewhere, and serve these blocks.  Raises MoveFailed."""
