"""Reads a push stream: each step goes to the session that it names, at any of the served spans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import trio

from node.runtime.nurseries import background_nursery
from node.serving.sessions.frame_rates import FrameBudget
from node.serving.sessions.hop_session import LEAST_TOLD_BYTES, FrameStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone, Refused
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits


class StepTaker(Protocol):
    """The part of `node.serving.sessions.listener.Listener` that takes pushed steps."""

    def feeds(self, peer: PeerId) -> bool:
        """See `Listener.feeds`."""

    def wants(self, beginning: bytes, size: int, peer: PeerId) -> bool:
        """See `Listener.wants`."""

    async def take_push(self, frame: Buffer, peer: PeerId, speed: int = 0) -> bool:
        """See `Listener.take_push`."""


async def read_pushes(stream: FrameStream, takers: Iterable[StepTaker], frames: FrameBudget) -> None:
    """Take steps until the peer closes the stream.  Raises PeerFault, PeerGone if none come for too long.

    takers: of the spans that are served when a step comes.  frames: steps that no session wants are counted.
    """
    state = _PushStream(stream.peer, takers, frames.rates.limits)
    stream.judge = state.judge
    async with background_nursery() as nursery:
        nursery.start_soon(state.end_when_idle, nursery.cancel_scope)
        while True:
            try:
                frame = await stream.receive()
            except Refused:  # a large one, of which nothing was kept
                await frames.spend("idle step", stream, hop=True)
                continue
            if frame is None:
                break
            state.in_hand = True
            speed = stream.speed if len(frame) > LEAST_TOLD_BYTES else 0
            for taker in takers:
                if await taker.take_push(frame, stream.peer, speed):
                    state.steps += 1
                    break
            else:
                await frames.spend("idle step", stream, hop=True)
            state.in_hand = False
    if state.idle:
        # no fault: its client may have gone.  The error resets the stream, which the peer notices.
        raise PeerGone(f"{stream.peer} opened a push stream and brings no steps")


@dataclass(slots=True)
class _PushStream:
    """One push stream.

    steps: taken by sessions so far.  in_hand: a step waits for room at its session.  idle: it was ended.
    """

    peer: PeerId
    takers: Iterable[StepTaker]
    limits: Limits
    steps: int = 0
    in_hand: bool = False
    idle: bool = False

    def judge(self, beginning: bytes, size: int) -> Refused | None:
        """A large step is read only where a session wants it.  Raises PeerFault."""
        if any(taker.wants(beginning, size, self.peer) for taker in self.takers):
            return None
        return Refused("no session here takes this step")

    async def end_when_idle(self, scope: trio.CancelScope) -> None:
        """End a stream without steps: soon if no session is fed by the peer, else after a session's time."""
        look_seconds, idle_seconds = self.limits.session_first_step_seconds, 0.0
        while True:
            before = self.steps
            await trio.sleep(look_seconds)
            if self.in_hand or self.steps != before:
                idle_seconds = 0.0
                continue
            idle_seconds += look_seconds
            fed = any(taker.feeds(self.peer) for taker in self.takers)
            if not fed or idle_seconds > self.limits.session_idle_seconds:
                self.idle = True
                scope.cancel()
                return
