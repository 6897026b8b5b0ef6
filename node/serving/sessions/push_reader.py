"""Reads a push stream: each step goes to the session that it names, at any of the served spans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from node.serving.sessions.frame_rates import FrameBudget
from node.serving.sessions.hop_session import FrameStream
from routing.names import PeerId
from tensor_codec.frame import Buffer


class StepTaker(Protocol):
    """The part of `node.serving.sessions.listener.Listener` that takes pushed steps."""

    async def take_push(self, frame: Buffer, peer: PeerId) -> bool:
        """See `Listener.take_push`."""


async def read_pushes(stream: FrameStream, takers: Iterable[StepTaker], frames: FrameBudget) -> None:
    """Take steps until the peer closes the stream.  Raises PeerFault.

    takers: of the spans that are served when a step comes.  frames: steps that no session wants are counted.
    """
    while (frame := await stream.receive()) is not None:
        for taker in takers:
            if await taker.take_push(frame, stream.peer):
                break
        else:
            await frames.spend("idle step", stream, hop=True)
