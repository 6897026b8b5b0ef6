"""The message with the output of a step, and the times that it tells."""

from __future__ import annotations

import trio

from node.serving.executor.engine import Answer
from node.serving.sessions.hop_session import HopSession
from node.serving.sessions.inbox import Arrived
from tensor_codec.messages.contract import MAX_HOPS, StepRange
from tensor_codec.messages.session import Result, Step


def message_of(hop: HopSession, arrived: Arrived, what: StepRange, answer: Answer) -> Step | Result:
    """The message with the output of a step, by the present route: to the next hop or to the client."""
    step, timings = arrived.step, timings_of(arrived, answer)
    speeds = _speeds(arrived) if arrived.speed or step.speeds else ()
    if hop.route.successor is None:
        position = what.position if hop.route.relay else what.reply_position
        return Result(step.step, position, answer.body, timings, hop.route.epoch, speeds=speeds)
    packed = answer.packed if hop.route.pack else None
    body = answer.body if packed is None else packed
    return Step(
        step.session, step.step, step.position, step.reply, body, timings, step.epoch, step.bulk,
        step.rope_length, step.rows, hop.key[0], packed is not None, speeds,
    )  # fmt: skip


def timings_of(arrived: Arrived, answer: Answer) -> tuple[tuple[int, int], ...]:
    """Of each hop so far, this one's the last: microseconds in its hands, computing.

    The next hop takes no more than MAX_HOPS, whatever came in.
    """
    held = int((trio.current_time() - arrived.at) * 1e6)
    return (*arrived.step.timings, (held, answer.compute_micros))[-MAX_HOPS:]


def _speeds(arrived: Arrived) -> tuple[int, ...]:
    """Of the links to each hop so far, this one's the last; 0 for a hop that did not say it."""
    before = arrived.step.speeds, len(arrived.step.timings)
    return (*before[0][: before[1]], *[0] * (before[1] - len(before[0])), arrived.speed)[-MAX_HOPS:]
