"""Steps that previous hops push, and clients with many sessions: each finds its session here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from node.runtime.faults import Faults
from node.serving.sessions.hop_session import FrameStream, HopSession
from node.serving.sessions.push import PushLinks
from node.serving.sessions.session_table import SessionTable
from node.serving.sessions.together.flights import take_off
from node.serving.sessions.worker import HopWorker
from routing.names import PeerId
from tensor_codec.errors import MessageError, RemoteProtocolError
from tensor_codec.messages.fields import Message, read_message
from tensor_codec.messages.session import Step, read_step, step_epoch, step_session
from tensor_codec.messages.steps import check_step


@dataclass(frozen=True, slots=True)
class PushedSteps:
    """The sessions of a span, for push streams.

    worker: makes the worker of a session.  links: to the next hops, and the streams back to clients.
    """

    sessions: SessionTable
    faults: Faults
    worker: Callable[[HopSession], HopWorker]
    links: PushLinks

    def feeds(self, peer: PeerId, *, gathers: bool = False) -> bool:
        """Whether a session here gets its steps from this peer, and not from its client.

        gathers: or is this peer's own.
        """
        own = gathers and self.sessions.count_of(peer) > 0
        return own or any(hop.route.predecessor == peer for hop in self.sessions.by_key.values())

    def wants(self, beginning: bytes, size: int, peer: PeerId) -> bool:
        """Whether a session here takes a step of so many bytes, by its beginning.  Raises PeerFault."""
        message = read_message(beginning, frozenset({"step"}))
        session, owner = step_session(message)
        epoch = step_epoch(message)
        for hop in self.sessions.by_id.get(session, ()):
            if hop.feeder != peer or (owner and owner != hop.key[0]):
                continue
            if hop.scope.cancel_called or epoch != hop.route.epoch:
                return False
            if size <= hop.contract.frame_bytes:
                return True
            fault = MessageError(f"a step of {size} bytes, {hop.contract.frame_bytes} are allowed")
            self.worker(hop).end_for(fault, peer)
            return False
        return False

    async def take_push(self, message: Message, peer: PeerId, speed: int = 0) -> bool:
        """One step that `peer` pushes; False where it is of no session that goes on.  Raises PeerFault.

        speed: see `Arrived`.
        """
        session, owner = step_session(message)
        for hop in self.sessions.by_id.get(session, ()):
            feeder = hop.route.predecessor or hop.stream.peer  # `feeder`, for every token
            if feeder == peer and (not owner or owner == hop.key[0]):
                return await self._take(message, hop, peer, speed)
        return self._is_forgiven(session, owner, step_epoch(message), peer)

    def take_now(self, message: Message, peer: PeerId, speed: int = 0) -> bool:
        """As `take_push`, of a step that needs no task; False where nothing was done.  Raises PeerFault."""
        fields = message.header.fields  # `read_step` checks them; for every token
        session, owner = fields.get("s"), fields.get("o", b"")
        for hop in self.sessions.by_id.get(session, ()) if type(session) is bytes else ():
            if (hop.route.predecessor or hop.stream.peer) == peer and owner in (b"", hop.key[0]):
                if hop.scope.cancel_called or fields.get("e", 0) != hop.route.epoch:
                    return False  # before it is read: perhaps with another codec
                return take_off(self.worker(hop), read_step(message, hop.contract), peer, speed)
        return False

    def take_steps(self, steps: Sequence[Step], peer: PeerId) -> list[Step]:
        """Steps of many sessions that `peer` pushes; those of no session here that goes on.

        Each goes its own way, as in `take_push`.
        """
        left = []
        for step in steps:
            for hop in self.sessions.by_id.get(step.session, ()):
                feeder = hop.route.predecessor or hop.stream.peer
                if feeder == peer and (not step.owner or step.owner == hop.key[0]):
                    if not self._take_one(step, hop, peer):
                        left.append(step)
                    break
            else:
                if not self._is_forgiven(step.session, step.owner, step.epoch, peer):
                    left.append(step)
        return left

    @contextmanager
    def gather(self, stream: FrameStream, id: bytes) -> Iterator[None]:
        """Results of this peer's sessions that name this id may go back on its stream, within the context."""
        gathering, key = self.links.outbox.gathering, (str(stream.peer), id)
        gathering[key] = stream
        try:
            yield
        finally:
            if gathering.get(key) is stream:
                del gathering[key]

    def _is_forgiven(self, session: bytes, owner: bytes, epoch: int, peer: PeerId) -> bool:
        """Of a step that no session here gets from this peer: whether it ended while the step travelled."""
        if self.sessions.ended.forgives(peer, session, trio.current_time()):
            return True
        # A hop that has been replaced, a thief, or a client that opened its two hops differently.
        # The stream goes on: it serves other sessions too.
        named = self.sessions.by_id.get(session, ())
        if any(epoch == hop.route.epoch and owner in (hop.key[0], b"") for hop in named):
            fault = MessageError("a step of a session that another peer feeds")
            self.faults.add(peer, fault, bans=False)
        return False

    def _take_one(self, step: Step, hop: HopSession, peer: PeerId) -> bool:
        """As `_take`, of a step that came with others."""
        if hop.scope.cancel_called:
            return True
        if step.epoch != hop.route.epoch:
            return False
        worker = self.worker(hop)
        try:
            check_step(step, hop.contract)
            if not take_off(worker, step, peer):
                hop.put(step, peer)
        except (MessageError, RemoteProtocolError) as fault:
            worker.end_for(fault, peer)
        return True

    async def _take(self, message: Message, hop: HopSession, peer: PeerId, speed: int) -> bool:
        """Whether the step is of the session's present route."""
        if hop.scope.cancel_called:
            return True  # it ends just now
        worker = self.worker(hop)
        try:
            if step_epoch(message) != hop.route.epoch:
                return False  # it took an older route, perhaps with another codec
            step = read_step(message, hop.contract)
            if step.bulk:
                await hop.put_when_it_fits(step, peer, speed)
            elif not take_off(worker, step, peer, speed):
                hop.put(step, peer, speed)
        except (MessageError, RemoteProtocolError) as fault:
            worker.end_for(fault, peer)
        return True
