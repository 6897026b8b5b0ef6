"""Streams for requests without a session: kept for the next request, one request after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from client.chains.chooser import PeerStream
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, SlowPeer
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import Output, decode_output
from tensor_codec.messages.gradients import Collect, decode_gradients, encode_collect

REQUEST_STEPS = 3  # times a step's seconds that a request may take: it gives way to others' decode steps


class Asked(NamedTuple):
    """A request on its way: the parts of its frame, and what its answer is read against."""

    parts: list[Buffer]
    contract: Contract
    prompts: int  # positions of the prompts whose gradient comes back, 0 for none


@dataclass(slots=True)
class RequestStreams:
    """Streams to peers, of any number of tasks at a time.

    step_seconds: a request may take REQUEST_STEPS times as long.
    """

    open_stream: Callable[[PeerId], Awaitable[PeerStream]]
    limits: Limits
    step_seconds: float
    _idle: defaultdict[PeerId, list[PeerStream]] = field(default_factory=lambda: defaultdict(list))

    async def collect(self, peer: PeerId, asked: Collect, size: int) -> tuple[frozenset[int], bytes]:
        """A sum of gradients, `size` bytes long, and the numbers of the requests in it.

        Raises PeerFault, Refused.
        """
        if self._idle[peer]:
            with suppress(PeerGone):  # closed as idle; where the sum went with it, `Refused` follows
                return await self._sum(self._idle[peer].pop(), asked, size)
        return await self._sum(await self.open_stream(peer), asked, size)

    async def _sum(self, stream: PeerStream, asked: Collect, size: int) -> tuple[frozenset[int], bytes]:
        """Ask for a sum and take its parts.  The stream is kept for the next request, or reset."""
        seconds = self.step_seconds + size / self.limits.frame_floor_bytes_per_second
        with trio.move_on_after(seconds):
            try:
                await stream.send(encode_collect(asked))
                data, numbers = bytearray(), frozenset[int]()
                while len(data) < size:
                    frame = await stream.receive()
                    if frame is None:
                        raise PeerGone("the stream was closed in the middle of a sum of gradients")
                    part = decode_gradients(frame, len(data), size)
                    if isinstance(part, Failed):
                        raise part.error()
                    data += part.data
                    numbers = part.numbers
            except BaseException:
                await stream.reset()
                raise
            self._idle[PeerId(stream.peer)].append(stream)
            return numbers, bytes(data)
        raise SlowPeer(f"no sum of gradients within {seconds:.3g} s")

    async def ask(self, peer: PeerId, asked: Asked) -> Output:
        """Send a request and take the answer, on a stream that is open if there is one.

        Raises PeerFault, Refused.
        """
        message = None
        if self._idle[peer]:
            with suppress(PeerGone):  # closed as idle; a second request does no harm
                message = await self._question(self._idle[peer].pop(), asked)
        if message is None:
            message = await self._question(await self.open_stream(peer), asked)
        if isinstance(message, Failed):
            raise message.error()
        return message

    async def _question(self, stream: PeerStream, asked: Asked) -> Output | Failed:
        """Send a request and return its answer.  Raises SlowPeer, PeerGone, FrameError, MessageError.

        The stream is kept for the next request, or reset.  Reading begins with the sending: a peer
        that refuses does not wait for the whole frame.
        """
        size = sum(len(part) for part in asked.parts)
        seconds = REQUEST_STEPS * self.step_seconds + 2 * size / self.limits.frame_floor_bytes_per_second
        frame: Buffer | None = None
        fault: PeerFault | None = None
        sent = kept = False

        async def send() -> None:
            nonlocal fault, sent
            try:
                await stream.send(asked.parts)
                sent = True
            except PeerFault as error:
                fault = error  # an answer that came in before can still be read

        async def receive() -> None:
            nonlocal frame, fault
            try:
                frame = await stream.receive()
            except PeerFault as error:
                fault = fault or error
            nursery.cancel_scope.cancel()

        try:
            with trio.move_on_after(seconds) as limit:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    nursery.start_soon(receive)
            if frame is None and limit.cancelled_caught:
                raise SlowPeer(f"no answer within {seconds:.3g} s")
            if frame is None:
                raise fault or PeerGone("the stream was closed instead of an answer")
            message = decode_output(frame, asked.contract, asked.prompts)
            kept = sent
        finally:
            if not kept:
                await stream.reset()
        if kept:
            self._idle[PeerId(stream.peer)].append(stream)
        return message
