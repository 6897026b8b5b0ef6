"""The outputs of a batch on their way: those that go to one peer share a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.session import Result, Step, encode_result, encode_step
from tensor_codec.messages.steps import encode_results, encode_steps, grouped


class Taker(Protocol):
    """A stream, or a link, that takes frames."""

    def send_now(self, frame: list[Buffer], /) -> bool:
        """Send one frame where that needs no waiting; False where nothing was done."""


class NextHop(Taker, Protocol):
    """The part of `node.serving.sessions.push.PushLink` that takes steps."""

    @property
    def batches(self) -> bool:
        """Whether the peer takes frames of many sessions."""


class Sent(Protocol):
    """The part of a step under way that waits for its output to be sent."""

    def sent(self, *, done: bool) -> None:
        """The output is on its way; done=False: it needs a wait, and was not sent."""


M = TypeVar("M", Step, Result)


@dataclass(frozen=True, slots=True)
class Outgoing(Generic[M]):
    """A message, and the step that waits for it.  session: of a result.  stream: of that session alone."""

    message: M
    waiting: Sent
    session: bytes = b""
    stream: Taker | None = None


@dataclass(slots=True)
class Outbox:
    """Collects the outputs of a batch until `flush`.  Holds nothing between two batches.

    most: of a frame.  gathering: streams of clients that take the results of many sessions, by peer and by
    `Open.gather`.
    """

    most: int = Limits().max_steps_per_frame
    gathering: dict[tuple[str, bytes], Taker] = field(default_factory=dict)
    _steps: dict[int, tuple[NextHop, list[Outgoing[Step]]]] = field(default_factory=dict)
    _results: dict[tuple[str, bytes], list[Outgoing[Result]]] = field(default_factory=dict)

    def add_step(self, link: NextHop, step: Step, waiting: Sent) -> None:
        """Take an output that goes to a next hop."""
        self._steps.setdefault(id(link), (link, []))[1].append(Outgoing(step, waiting))

    def add_result(
        self, gather: tuple[str, bytes], session: bytes, stream: Taker, result: Result, waiting: Sent
    ) -> None:
        """Take an output that goes to a client.  stream: to it, of this session alone.

        gather: the key in `gathering` of the stream that it may come on.
        """
        outgoing = Outgoing(result, waiting, session, stream)
        self._results.setdefault(gather, []).append(outgoing)

    def flush(self) -> None:
        """Send everything that needs no waiting."""
        if self._steps:
            steps, self._steps = self._steps, {}
            for link, outgoing in steps.values():
                self._send_steps(link, outgoing)
        if self._results:
            results, self._results = self._results, {}
            for gather, answers in results.items():
                self._send_results(self.gathering.get(gather), answers)

    def _send_steps(self, link: NextHop, outgoing: Sequence[Outgoing[Step]]) -> None:
        if len(outgoing) == 1:
            one = outgoing[0]
            return one.waiting.sent(done=link.send_now(encode_step(one.message)))
        for group in grouped(outgoing, lambda one: one.message, self.most if link.batches else 1):
            steps = [one.message for one in group]
            done = link.send_now(encode_step(steps[0]) if len(steps) == 1 else encode_steps(steps))
            for one in group:
                one.waiting.sent(done=done)
        return None

    def _send_results(self, shared: Taker | None, outgoing: Sequence[Outgoing[Result]]) -> None:
        if shared is None or len(outgoing) == 1:
            return _send_apart(outgoing)
        for group in grouped(outgoing, lambda one: one.message, self.most):
            if len(group) > 1 and shared.send_now(
                encode_results([(one.session, one.message) for one in group])
            ):
                for one in group:
                    one.waiting.sent(done=True)
            else:
                _send_apart(group)
        return None


def _send_apart(outgoing: Sequence[Outgoing[Result]]) -> None:
    """Each result on the stream of its session."""
    for one in outgoing:
        assert one.stream is not None
        one.waiting.sent(done=one.stream.send_now(encode_result(one.message)))
