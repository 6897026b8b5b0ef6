"""What the balancer needs of the server that it moves."""

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
        """What the node says of itself while it serves: peer, revision, blocks, start, stop."""

    async def announce_move(self, blocks: Blocks) -> None:
        """Say that the node is about to serve these blocks."""

    async def stay(self) -> None:
        """Say again that the node serves what it serves."""

    async def move(self, blocks: Blocks) -> None:
        """Let the sessions move elsewhere, and serve these blocks.  Raises MoveFailed."""
