"""Newcomers: a peer with a new id each second, that pings a node, and sometimes opens a session.

A worker of tests.hostile.
"""

from __future__ import annotations

import random
import sys
import time

import trio

from node.network.host import open_host
from node.runtime.nurseries import run
from tensor_codec.errors import PeerFault, PeerGone, Refused
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import SESSION_PROTOCOL, decode_open_reply, encode_close, encode_open
from tensor_codec.span_spec import SpanSpec
from tests.hostile.stage import Target, new_identity, opening, served_by, spec_of, target_of
from tests.hostile.talking import say

EVERY_SECONDS = 1.0
JITTER = 0.3  # of it: a node that is looked at every second must not hold a newcomer at each look
PATIENCE_SECONDS = 3.0
OPENS = 3  # each third one opens a session too
SESSION_TOKENS = 64


async def come_forever(target: Target) -> None:
    """Say of each newcomer when it came, and how long it took."""
    spec = spec_of(await served_by(target))
    say(ready=True)
    number, rng = 0, random.Random(1)
    async with trio.open_nursery() as nursery:
        due = trio.current_time()
        while True:
            nursery.start_soon(come, target, spec if number % OPENS == 0 else None)
            number += 1
            due += EVERY_SECONDS * rng.uniform(1 - JITTER, 1 + JITTER)
            await trio.sleep_until(due)


async def come(target: Target, spec: SpanSpec | None) -> None:
    """One newcomer, with a session where there is a spec."""
    seconds, error = None, ""
    async with open_host(identity=new_identity(), listen=[]) as host:
        began = time.monotonic()
        try:
            with trio.fail_after(PATIENCE_SECONDS):
                await host.ping(target.peer, target.where, seconds=PATIENCE_SECONDS)
                if spec is not None:
                    stream = await host.open_stream(
                        target.peer, target.where, SESSION_PROTOCOL, seconds=PATIENCE_SECONDS
                    )
                    await stream.send(encode_open(opening(spec, SESSION_TOKENS)))
                    frame = await stream.receive(PATIENCE_SECONDS)
                    if frame is None:
                        raise PeerGone("the stream was closed")
                    if isinstance(reply := decode_open_reply(frame), Failed):
                        raise reply.error()
                    await stream.send(encode_close())
                    await stream.aclose()
            seconds = time.monotonic() - began
        except trio.TooSlowError:
            error = f"not within {PATIENCE_SECONDS:g} s"
        except (PeerFault, Refused, OSError) as fault:
            error = f"{type(fault).__name__}: {fault}"
        say(newcomer=[began, seconds, error[:120]])


if __name__ == "__main__":
    target = target_of(sys.argv[1])
    run(lambda: come_forever(target))
