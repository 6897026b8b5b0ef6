"""Asking a server for its state: one question, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tensor_codec.errors import PeerGone
from tensor_codec.frame import Buffer
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.info import PeerInfo, decode_info, encode_describe


class QuestionStream(Protocol):
    """The part of `node.network.streams.FramedStream` that a question needs."""

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """See `FramedStream.send`."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """See `FramedStream.receive`."""

    async def aclose(self) -> None:
        """See `FramedStream.aclose`."""

    async def reset(self) -> None:
        """See `FramedStream.reset`."""


async def ask_for_info(stream: QuestionStream, seconds: float) -> PeerInfo:
    """The peer's state by its own word, on a new stream of INFO_PROTOCOL, which is closed then.

    seconds: for the question, and for the answer.  Raises PeerFault, Refused.
    """
    try:
        await stream.send(encode_describe(), seconds)
        frame = await stream.receive(seconds)
        if frame is None:
            raise PeerGone("the stream was closed instead of an answer")
        answer = decode_info(frame)
    except BaseException:
        await stream.reset()
        raise
    await stream.aclose()
    if isinstance(answer, Failed):
        raise answer.error()
    return answer
