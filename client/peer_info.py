"""Asking a server for its state: one question, one answer."""

from __future__ import annotations

from client.chains.chooser import PeerStream
from tensor_codec.errors import PeerGone
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.info import PeerInfo, decode_info, encode_describe


async def ask_for_info(stream: PeerStream, seconds: float) -> PeerInfo:
    """What the peer says of itself, on a new stream of INFO_PROTOCOL, which is closed then.

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
