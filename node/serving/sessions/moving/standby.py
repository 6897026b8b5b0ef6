"""A standby of the next hop: it gets this hop's outputs in the background, and its cache follows.

The standby has a session like every other hop's.  It gets the outputs as parts of a replay, several
positions at once, out of the journal: nothing of this is in the way of a step.  It lags behind by what came
since the last look, and a repair sends it just that (docs/decisions/0063).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from node.serving.executor.engine import Engine
from node.serving.sessions.hop_session import HopSession
from node.serving.sessions.push import Outlet
from routing.names import PeerId
from tensor_codec.errors import PeerFault
from tensor_codec.limits import Limits
from tensor_codec.messages.session import Feed, Step, encode_step

LOOK_SECONDS = 0.05  # between two looks at the journal: a standby lags behind by so much, and its computing
AGAIN_SECONDS = 1.0  # after a fault of the way; doubles
TRIES = 5
YIELD_SECONDS = 0.005  # between two looks at an engine that others wait for
MAX_YIELDS = 50


@dataclass(slots=True)
class StandbyFeed:
    """Sends one session's outputs to a standby of the next hop, until `scope` is cancelled.

    position: of the next output; the standby has those before it.
    """

    hop: HopSession
    peer: PeerId
    position: int
    limits: Limits
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @classmethod
    def of(cls, hop: HopSession, order: Feed, limits: Limits) -> StandbyFeed:
        """As the client orders."""
        return cls(hop, PeerId(order.peer), order.position, limits)

    async def run(self) -> None:
        """Feed the standby.  It ends, and the standby follows no more, where the way fails repeatedly."""
        with self.scope:
            for attempt in range(TRIES):
                own = self.hop.outlet
                outlet = Outlet(own.links, self.limits.session_idle_seconds, own.client)
                try:
                    with trio.move_on_after(self.limits.successor_seconds):
                        await outlet.connect(self.peer)
                    if outlet.link is not None and await outlet.begin_aside():
                        return await self._send_all(outlet)
                except PeerFault:
                    pass  # the client has a stream of its own to the standby, and knows as much
                finally:
                    with trio.CancelScope(shield=True):  # bounded
                        await outlet.aclose()
                await trio.sleep(AGAIN_SECONDS * 2**attempt)

    async def _send_all(self, outlet: Outlet) -> None:
        """Send what is there and what comes.  Raises PeerGone, SlowPeer."""
        hop = self.hop
        while (journal := hop.kept.journal) is not None and not journal.reordered:
            self.position = min(self.position, journal.take_changed())
            if self.position < journal.start:
                return  # these outputs are not kept any more
            if self.position >= journal.stop:
                await trio.sleep(LOOK_SECONDS)
                continue
            part = hop.contract.replay_part
            start, stop, rope_length = next(journal.parts(self.position, journal.stop, part))
            body = bytes(journal.read(start, stop))  # the journal may change while this is sent
            number = hop.state.last[0] if hop.state.last is not None else 0
            step = Step(
                hop.contract.session, number, start, "replay", body, (), hop.route.epoch, True, rope_length,
                owner=hop.key[0],
            )  # fmt: skip
            self.position = stop
            await outlet.send(encode_step(step), bulk=True)


async def give_way(engine: Engine) -> None:
    """Wait while steps are queued that somebody waits for.  Bounded by a quarter of a second."""
    for _ in range(MAX_YIELDS):
        if not engine.batcher.waiting:
            return
        await trio.sleep(YIELD_SECONDS)
