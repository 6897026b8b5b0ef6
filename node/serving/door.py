"""The way in to whatever span is served just now: streams outlive the span that they came for.

A node that moves is reached under the same protocols before and after, and its peers keep their push
streams to it: each step goes to its session, of the span that is served when it arrives or, as long as
these have not all moved elsewhere, of the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.serving.hop import FrameStream
from node.serving.stateless import PeekStream
from node.serving.stint import Stint
from tensor_codec.errors import Draining
from tensor_codec.limits import Limits
from tensor_codec.messages import Failed, encode_failed

RETRY_SECONDS = 2.0  # after which the new blocks may be there


@dataclass(slots=True)
class Door:
    """Leads each stream to the stint of the moment; where there is none, it says so.

    leaving: the one before, while its sessions move elsewhere.
    """

    limits: Limits
    stint: Stint | None = None
    leaving: Stint | None = None

    @property
    def stints(self) -> tuple[Stint, ...]:
        """Those that have sessions, the present one first."""
        return tuple(stint for stint in (self.stint, self.leaving) if stint is not None)

    async def serve_session(self, stream: FrameStream) -> None:
        """Serve the stream of one session.  Raises PeerFault."""
        if self.stint is None:
            await self._refuse(stream)
        else:
            await self.stint.listener.serve_session(stream)

    async def serve_request(self, stream: PeekStream) -> None:
        """Serve a stream of requests without a session.  Raises PeerFault."""
        if self.stint is None:
            await self._refuse(stream)
        else:
            await self.stint.stateless.serve(stream)

    async def serve_push(self, stream: FrameStream) -> None:
        """Take steps that a peer pushes, until it closes the stream.  Raises PeerFault."""
        while (frame := await stream.receive()) is not None:
            for stint in self.stints:  # if there is none, its sessions have ended, and their clients know it
                if await stint.listener.take_push(frame, stream.peer):
                    break

    async def _refuse(self, stream: FrameStream) -> None:
        if await stream.receive(self.limits.frame_start_seconds) is not None:
            no = Draining("this node is loading other blocks", RETRY_SECONDS)
            await stream.send(encode_failed(Failed.of(no)))
