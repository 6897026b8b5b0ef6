"""Tapes: graphs of forwards that clients may go back through, kept within a budget of memory.

A backward over a tape computes nothing again; one without a tape runs its blocks forward once more, so a tape
that is dropped costs time and no result.  The memory goes to those who train: one peer may have all of it
while nobody else asks.  Where it is used up the network prefix that holds most gives way, in it the peer that
holds most, with its oldest tape.  A peer with a share of its own (`Limits.peer_shares`) stands beside the
prefixes, and what it holds up to its share does not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from node.model.adapters.prefix import AnySpanAdapter
from node.model.blocks.forward_backward import Tape
from node.serving.executor.out_of_memory import OutOfMemory
from node.serving.fair_shares import counted, party_of
from tensor_codec.blocks import Blocks
from tensor_codec.errors import MessageError, NoTape, Refused
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.forward_backward import Backward, Forward, Run

GRAPH_BYTES = 64 * 1024  # of a block's graph without its tensors
MAX_TAPES = 256  # a tape counts as a part of the memory in any case: many short ones are no use


@dataclass(slots=True, eq=False)
class KeptTape:
    """A tape, or the place of one whose forward is computed now.

    run, contract: of its forward.  size: bytes.  prefix: of its peer's network address, "" where unknown.
    since: of the last request of its peer, on the caller's clock.  busy: a request is computed with it.
    answered: its forward was computed.
    """

    peer: str
    run: Run
    contract: Contract
    size: int
    prefix: str
    since: float
    tape: Tape = field(default_factory=Tape)
    busy: bool = True
    answered: bool = False

    @property
    def id(self) -> bytes:
        """The client's name of it."""
        return self.run.tape

    @property
    def party(self) -> str:
        """The holder that shares are counted for: the prefix, or a peer without one."""
        return self.prefix or self.peer

    def fits(self, run: Run, contract: Contract) -> bool:
        """Whether a backward is one of this forward; its codec may be another one."""
        return (run.spec.blocks, run.spec.adapter, run.batch, run.prompts, contract.max_length) == (
            self.run.spec.blocks,
            self.run.spec.adapter,
            self.run.batch,
            self.run.prompts,
            self.contract.max_length,
        )


@dataclass(slots=True)
class TapeBudget:
    """Which tapes are kept: pure.

    capacity: bytes.  own_shares: peers with a part of it of their own, and that part.

    Promises, checked by tests/unit/test_tapes.py:
      * all tapes together never have more than `capacity` bytes;
      * while there is room nothing is dropped before it was idle for `idle_seconds`, counted from the last
        request of its peer;
      * a tape that a request is computed with is never dropped;
      * a tape is dropped for a new one only if it is of the same peer, or if its prefix would hold more than
        the new one's, or if both have one prefix and its peer would; of the largest holder, the oldest first;
      * nothing is dropped for a tape that does not fit in the end;
      * a peer within its own share loses no tape to others, and any that holds something makes room for it;
      * nobody but its own peer gets a tape.
    """

    capacity: int
    idle_seconds: float
    own_shares: Mapping[str, float] = field(default_factory=dict)
    _tapes: dict[tuple[str, bytes], KeptTape] = field(default_factory=dict)  # the oldest first

    @property
    def used(self) -> int:
        """Bytes of all tapes."""
        return sum(each.size for each in self._tapes.values())

    def __len__(self) -> int:
        return len(self._tapes)

    def open(self, new: KeptTape) -> bool:
        """Take a place for the tape of a forward, busy until `keep` or `close`; False: there is none.

        A tape of the peer with this id makes way, unless it is busy.
        """
        key = new.peer, new.id
        before = self._tapes.get(key)
        if before is not None and before.busy:
            return False
        others = [each for each in self._tapes.values() if each is not before]
        dropped = list(_dropped_for(new, others, self.capacity, self.own_shares))
        if sum(each.size for each in others) - sum(each.size for each in dropped) + new.size > self.capacity:
            return False
        for each in (before, *dropped):
            if each is not None:
                self.close(each)
        self._tapes[key] = new
        return True

    def keep(self, tape: KeptTape) -> None:
        """The request with this tape is done; the tape may be used, and dropped."""
        tape.busy = False

    def take(self, peer: str, tape_id: bytes) -> KeptTape | None:
        """The peer's tape with this id, busy from now on; None without one."""
        found = self._tapes.get((peer, tape_id))
        if found is None or found.busy:
            return None
        found.busy = True
        return found

    def close(self, tape: KeptTape) -> None:
        """Forget a tape; a second time changes nothing."""
        key = tape.peer, tape.id
        if self._tapes.get(key) is tape:
            del self._tapes[key]

    def touch(self, peer: str, now: float) -> None:
        """A request of this peer came, or was answered."""
        for each in self._tapes.values():
            if each.peer == peer:
                each.since = now

    def drop_idle(self, now: float) -> None:
        """Drop the tapes whose peers have asked for nothing for `idle_seconds`."""
        self._drop(lambda tape: now >= tape.since + self.idle_seconds)

    def drop_outside(self, served: Blocks) -> None:
        """Drop the tapes of blocks that are served no longer."""
        self._drop(lambda tape: not served.contains(tape.run.spec.blocks))

    def drop_all(self) -> None:
        """Drop all tapes that no request is computed with."""
        self._drop(lambda tape: True)

    def next_idle(self) -> float:
        """When `drop_idle` has something to drop, at the earliest; infinity without tapes."""
        times = (each.since + self.idle_seconds for each in self._tapes.values() if not each.busy)
        return min(times, default=math.inf)

    def _drop(self, unwanted: Callable[[KeptTape], bool]) -> None:
        for each in [each for each in self._tapes.values() if not each.busy and unwanted(each)]:
            self.close(each)


def _dropped_for(
    new: KeptTape, others: list[KeptTape], capacity: int, own_shares: Mapping[str, float]
) -> Iterator[KeptTape]:
    """The tapes that make way for a new one, until it fits or nobody has to."""
    left = list(others)
    while sum(each.size for each in left) + new.size > capacity:
        victim = _victim(new, left, capacity, own_shares)
        if victim is None:
            return
        left.remove(victim)
        yield victim


def _victim(
    new: KeptTape, tapes: list[KeptTape], capacity: int, own_shares: Mapping[str, float]
) -> KeptTape | None:
    """The oldest idle tape of the largest peer of the largest prefix that has one; the new one counts."""
    parts, peers = Counter[str](), Counter[str]()

    def party_with(tape: KeptTape) -> str:
        return party_of(tape.peer, tape.party, own_shares)

    for each in (new, *tapes):
        parts[party_with(each)] += each.size
        peers[each.peer] += each.size
    parties = {party: counted(party, part, capacity, own_shares) for party, part in parts.items()}
    asks = party_with(new)

    def may_go(tape: KeptTape) -> bool:
        if tape.busy or tape.peer == new.peer:
            return not tape.busy
        if party_with(tape) == asks:
            return peers[tape.peer] > peers[new.peer]
        return parties[party_with(tape)] > parties[asks]

    going = filter(may_go, tapes)
    return max(going, key=lambda tape: (parties[party_with(tape)], peers[tape.peer]), default=None)


@dataclass(slots=True)
class Tapes:
    """The tapes of a served span; `run` drops idle ones.

    activations: from the tokens of a row, bytes of a position in one block.  free: bytes of memory that
    training may take now.
    """

    budget: TapeBudget
    activations: Callable[[int], Awaitable[float]]
    free: Callable[[], int]
    _changed: trio.Event = field(default_factory=trio.Event)

    @asynccontextmanager
    async def tape_for(
        self,
        peer: str,
        prefix: str,
        request: Forward | Backward,
        contract: Contract,
        adapter: AnySpanAdapter | None = None,
    ) -> AsyncIterator[KeptTape | None]:
        """The tape for the time in which a request is computed.  adapter: of the request.

        None for a request without one, and for a forward where there is no memory for it.  A forward's is
        kept afterwards where the block says `answered`; a backward's where the block raises Refused and not
        OutOfMemory: then nothing was done.
        Raises NoTape, and MessageError for a backward that does not fit to the forward of its tape.
        """
        backward = isinstance(request, Backward)
        self.budget.touch(peer, trio.current_time())
        if not request.run.tape:
            kept = None
        elif backward:
            kept = self._taken(peer, request.run, contract)
        else:
            kept = await self._opened(peer, prefix, request.run, contract, adapter)
        stays = False
        try:
            yield kept
            stays = not backward
        except Refused as refusal:
            stays = backward and not isinstance(refusal, OutOfMemory)
            raise
        finally:
            if kept is not None and stays and (backward or kept.answered):
                self.budget.keep(kept)
            elif kept is not None:
                self.budget.close(kept)
            self.budget.touch(peer, trio.current_time())
            self._changed.set()

    async def run(self) -> None:
        """Drop idle tapes, until cancelled."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(self.budget.next_idle()):
                await self._changed.wait()
            self.budget.drop_idle(trio.current_time())

    def _taken(self, peer: str, run: Run, contract: Contract) -> KeptTape:
        kept = self.budget.take(peer, run.tape)
        if kept is None:
            raise NoTape("that tape is not here, or no longer: send the hidden states")
        if not kept.fits(run, contract):
            self.budget.keep(kept)
            raise MessageError(
                f"a gradient of {contract.batch} x {contract.max_length} positions with {run.prompts} prompts"
                f" for blocks {contract.start}:{contract.stop}, and the tape of another forward"
            )
        return kept

    async def _opened(
        self, peer: str, prefix: str, run: Run, contract: Contract, adapter: AnySpanAdapter | None
    ) -> KeptTape | None:
        if not self.budget.capacity:
            return None
        tokens, blocks = contract.max_length, contract.stop - contract.start
        if adapter is not None:
            tokens += adapter.virtual_tokens  # a prefix takes places in every row
        of_a_position, copies = await self.activations(tokens), 0
        if adapter is not None:
            of_a_position += adapter.kept_bytes
            copies = 4 * adapter.values(contract.start, contract.stop)  # float32, leaves of the graph
        activations = int(of_a_position * contract.batch * tokens * blocks) + copies
        if activations > self.free():
            return None
        size = max(activations, blocks * GRAPH_BYTES, self.budget.capacity // MAX_TAPES)
        new = KeptTape(peer, run, contract, size, prefix, trio.current_time())
        return new if self.budget.open(new) else None


def no_tapes() -> Tapes:
    """Tapes without memory: none is ever kept."""

    async def unknown(tokens: int) -> float:
        return math.inf

    return Tapes(TapeBudget(0, 0.0), unknown, lambda: 0)
