"""A server that lies: it takes every session, computes nothing, and says what a lie makes of each message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tensor_codec.errors import PeerFault
from tensor_codec.frame import Buffer
from tensor_codec.messages.fields import Failed, Message, encode_failed, read_message
from tensor_codec.messages.session import (
    SESSION_PROTOCOL,
    Here,
    Open,
    Opened,
    Relinked,
    decode_open,
    encode_here,
    encode_opened,
    encode_relinked,
    step_session,
)

KINDS = frozenset({"step", "relink", "resume", "where", "close"})


class Stream(Protocol):
    """The part of a framed stream that a liar needs."""

    @property
    def protocol(self) -> str:
        """Agreed."""

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """Send one frame."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """The next frame."""


@dataclass
class LyingSession:
    """One session at a liar.  steps: the numbers of those that came.  asked: for its progress, so often."""

    opened: Open
    stream: Stream
    steps: list[int] = field(default_factory=list)
    asked: int = 0


Say = Callable[[LyingSession, Message], Sequence[list[Buffer]]]


@dataclass
class LyingNode:
    """Serves streams.  say: the answers to a message.  opened: sessions, in all."""

    say: Say
    opened: int = 0
    _sessions: dict[bytes, LyingSession] = field(default_factory=dict)

    async def __call__(self, stream: Stream) -> None:
        """Serve a stream until its peer ends it.  Raises PeerFault."""
        if stream.protocol != SESSION_PROTOCOL:
            return await self._take_pushes(stream)
        frame = await stream.receive(5.0)
        if frame is None:
            return None
        opened = decode_open(frame)
        self.opened += 1
        session = self._sessions[opened.session] = LyingSession(opened, stream)
        await stream.send(encode_opened(Opened(opened.successor is not None, rows=opened.batch > 1)))
        while (frame := await stream.receive()) is not None:
            message = read_message(frame, KINDS)
            if message.kind == "close":
                return None
            for said in self._answers(session, message):
                await stream.send(said)
        return None

    def _answers(self, session: LyingSession, message: Message) -> Sequence[list[Buffer]]:
        header = message.header
        if message.kind == "relink":
            push = "successor" in header
            return [encode_relinked(Relinked(header.integer("e", 0, 1 << 31), push, 0, 0))]
        if message.kind == "step":
            session.steps.append(header.integer("n", 0, 1 << 53))
        session.asked += message.kind == "where"
        return self.say(session, message)

    async def _take_pushes(self, stream: Stream) -> None:
        while (frame := await stream.receive()) is not None:
            message = read_message(frame, KINDS)
            session = self._sessions.get(step_session(message)[0])
            if session is None:
                continue
            try:
                for said in self._answers(session, message):
                    await session.stream.send(said)
            except PeerFault:
                continue  # its client has gone


def blames(peer: str | None, code: str = "bad_values") -> Say:
    """Every step ends the session for a fault of this peer; None: of the hop before, if there is one."""

    def say(session: LyingSession, message: Message) -> Sequence[list[Buffer]]:
        if message.kind == "where":
            return [encode_here(Here(0, 0))]
        if message.kind != "step":
            return []
        named = session.opened.predecessor or "nobody" if peer is None else peer
        why = "received hidden states hold NaN"
        return [encode_failed(Failed(code, why, step=session.steps[-1], peer=named))]

    return say


def ends(session: LyingSession, message: Message) -> Sequence[list[Buffer]]:
    """Every step finds the session over."""
    return [encode_failed(Failed("ended", "idle"))] if message.kind == "step" else []


def grows(by: int, *, waiting: int = 1, done: bool = False) -> Say:
    """It never answers a step, and says each time that it has more positions; done: and the step too."""

    def say(session: LyingSession, message: Message) -> Sequence[list[Buffer]]:
        if message.kind != "where":
            return []
        last = session.steps[-1] if session.steps else None
        number = last if done or last is None else max(0, last - 1)
        length = max(0, min(session.opened.max_length, session.asked * by))
        return [encode_here(Here(length, waiting, number))]

    return say


LIES: tuple[Say, ...] = (
    blames(None),
    blames(None, "cannot_push"),
    ends,
    grows(1),
    grows(7, waiting=0),
    grows(1, waiting=0, done=True),
)
