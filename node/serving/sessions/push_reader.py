"""Reads a push stream: each step goes to the session that it names, at any of the served spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import trio

from node.runtime.nurseries import background_nursery
from node.serving.sessions.frame_rates import FrameBudget
from node.serving.sessions.hop_session import LEAST_TOLD_BYTES, FrameStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone, Refused, RemoteProtocolError
from tensor_codec.frame import Buffer
from tensor_codec.messages.fields import Message, read_message
from tensor_codec.messages.session import Step, begins_step
from tensor_codec.messages.steps import read_gather, read_steps

_KINDS = frozenset({"step", "steps", "gather"})
_STEP = frozenset({"step"})


class StepTaker(Protocol):
    """The part of `node.serving.sessions.listener.Listener` that takes pushed steps."""

    def feeds(self, peer: PeerId, *, gathers: bool = False) -> bool:
        """See `Listener.feeds`."""

    def wants(self, beginning: bytes, size: int, peer: PeerId) -> bool:
        """See `Listener.wants`."""

    async def take_push(self, message: Message, peer: PeerId, speed: int = 0) -> bool:
        """See `Listener.take_push`."""

    def take_now(self, message: Message, peer: PeerId, speed: int = 0) -> bool:
        """See `Listener.take_now`."""

    def take_steps(self, steps: Sequence[Step], peer: PeerId) -> list[Step]:
        """See `Listener.take_steps`."""

    def gather(self, stream: FrameStream, id: bytes) -> AbstractContextManager[None]:
        """See `Listener.gather`."""


async def read_pushes(stream: FrameStream, takers: Iterable[StepTaker], frames: FrameBudget) -> None:
    """Take steps until the peer closes the stream.  Raises PeerFault, PeerGone if none come for too long.

    takers: of the spans that are served when a step comes.  frames: steps that no session wants are counted.
    """
    state = _PushStream(stream, takers, frames)
    stream.judge = state.judge
    async with background_nursery() as nursery:
        nursery.start_soon(state.end_when_idle, nursery.cancel_scope)
        with ExitStack() as gathering:
            while True:
                try:
                    frame = await stream.receive(taker=state.take_now)
                except Refused:  # a large one, of which nothing was kept
                    await frames.spend("idle step", stream, hop=True)
                    continue
                if frame is None:
                    break
                message = read_message(frame, _KINDS)
                state.in_hand = True
                if message.kind == "gather":
                    state.gather(message, gathering)
                elif message.kind == "steps":
                    await state.take_steps(message)
                else:
                    await state.take(message, stream.speed if len(frame) > LEAST_TOLD_BYTES else 0)
                state.in_hand = False
    if state.idle:
        # no fault: its client may have gone.  The error resets the stream, which the peer notices.
        raise PeerGone(f"{stream.peer} opened a push stream and brings no steps")


@dataclass(slots=True)
class _PushStream:
    """One push stream.

    steps: taken by sessions so far.  in_hand: a step waits for room at its session.  idle: it was ended.
    gathers: results of the peer's sessions go back on it.
    """

    stream: FrameStream
    takers: Iterable[StepTaker]
    frames: FrameBudget
    steps: int = 0
    in_hand: bool = False
    idle: bool = False
    gathers: bool = False

    @property
    def peer(self) -> PeerId:
        """At its other end."""
        return self.stream.peer

    async def take(self, message: Message, speed: int) -> None:
        """One step."""
        for taker in self.takers:
            if await taker.take_push(message, self.peer, speed):
                self.steps += 1
                return
        await self.frames.spend("idle step", self.stream, hop=True)

    def take_now(self, frame: Buffer) -> bool:
        """One step that needs no task, see `FramedStream.receive`.  Raises PeerFault."""
        if not begins_step(frame):
            return False
        message = read_message(frame, _STEP)
        speed = self.stream.speed if len(frame) > LEAST_TOLD_BYTES else 0
        for taker in self.takers:
            if taker.take_now(message, self.peer, speed):
                self.steps += 1
                return True
        return False

    async def take_steps(self, message: Message) -> None:
        """Steps of many sessions."""
        steps = read_steps(message, self.frames.rates.limits.max_steps_per_frame)
        left = steps
        for taker in self.takers:
            if left:
                left = taker.take_steps(left, self.peer)
        self.steps += len(steps) - len(left)
        for _ in left:
            await self.frames.spend("idle step", self.stream, hop=True)

    def gather(self, message: Message, stack: ExitStack) -> None:
        """Send results of the peer's sessions on this stream, as long as it is open.  Raises PeerFault."""
        id = read_gather(message)
        if self.gathers:
            raise RemoteProtocolError("a second `gather` on one stream")
        self.gathers = True
        for taker in self.takers:
            stack.enter_context(taker.gather(self.stream, id))

    def judge(self, beginning: bytes, size: int) -> Refused | None:
        """A large step is read only where a session wants it.  Raises PeerFault."""
        if any(taker.wants(beginning, size, self.peer) for taker in self.takers):
            return None
        return Refused("no session here takes this step")

    async def end_when_idle(self, scope: trio.CancelScope) -> None:
        """End a stream without steps: soon if no session is fed by the peer, else after a session's time."""
        limits = self.frames.rates.limits
        look_seconds, idle_seconds = limits.session_first_step_seconds, 0.0
        while True:
            before = self.steps
            await trio.sleep(look_seconds)
            if self.in_hand or self.steps != before:
                idle_seconds = 0.0
                continue
            idle_seconds += look_seconds
            fed = any(taker.feeds(self.peer, gathers=self.gathers) for taker in self.takers)
            if not fed or (idle_seconds > limits.session_idle_seconds and not self.gathers):
                self.idle = True
                scope.cancel()
                return
