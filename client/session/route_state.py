"""The hops of a session's route, and the agreement on a new route with them.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from client.chains.chooser import Chooser
from client.session.actions import Action, Carry, Leave, Note, Postpone
from client.session.hop_state import HopState, Neighbours
from client.session.repair.contracts import Contracts, packs_over, way_of
from client.session.repair.replacement import Replacement
from client.session.repair.replay_plan import HopOrder, ResumePoint, plan
from client.session.standby.standbys import Standbys
from client.session.steps import Pending
from client.session.terms import Terms
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.errors import PeerFault, Refused, SlowPeer
from tensor_codec.messages.contract import Contract, Reply
from tensor_codec.messages.session import Result, Step

LATE_SECONDS = 1.0  # without an answer to Open: then a hop waits for free cache
REFUSED_SECONDS = 2.0  # for which this hop is then avoided


@dataclass(frozen=True, slots=True)
class Place:
    """One hop of a route before its agreement.

    state: of the hop, where it serves the session already; else it is opened.
    dtype: of its computation; None where the peer has just left the swarm.
    pack: for the link to the next hop, see `Open`.  follows: it is the place of a standby.
    """

    hop: Hop
    state: HopState | None
    dtype: str | None
    neighbours: Neighbours
    pack: int = 0
    follows: bool = False


@dataclass(frozen=True, slots=True)
class LineUp:
    """A route before the agreement with its hops.

    contract: of its epoch.  held: new hops come into a session that has positions already.
    pack: for the link from the client to the first hop, see `Open`.
    """

    places: tuple[Place, ...]
    epoch: int
    contract: Contract
    held: bool
    pack: int = 0


@dataclass(frozen=True, slots=True)
class Refill:
    """The missing positions of a new route, and their senders: see `client.session.repair.replay_plan`.

    orders: for each hop.  The client sends the first hop positions [client_from, position) again.
    bulk: hops to which the client opens a stream for the replay.
    step: where rows are reordered, the first step that comes after the replay.
    """

    orders: tuple[tuple[HopState, HopOrder], ...]
    client_from: int
    position: int
    bulk: tuple[HopState, ...]
    step: int | None = None


@dataclass(slots=True, eq=False)
class RouteState:
    """The hops that serve a session in each epoch, and their known neighbours.

    hops: of the present route.  opened: all hops that serve the session, the present route's included.
    chain: of the hops.  refilling: a replay may still be under way, which no step may overtake.
    reorders: steps reorder the rows, which every hop has to be able to do.
    pack: steps of at least so many rows go to the first hop in int8o; 0: none does.
    standbys: of the hops; they are neither in `hops` nor in `opened`.
    """

    terms: Terms
    chooser: Chooser
    contracts: Contracts
    epoch: int = 0
    hops: list[HopState] = field(default_factory=list)
    opened: list[HopState] = field(default_factory=list)
    chain: Chain = field(default_factory=lambda: Chain((), 0.0))
    refilling: bool = False
    reorders: bool = False
    pack: int = 0
    replacement: Replacement = field(init=False)
    standbys: Standbys = field(default_factory=Standbys)

    def __post_init__(self) -> None:
        self.replacement = Replacement(self.terms, self.chooser)

    def choose(self, last_resort: bool = False) -> Chain:
        """The chain to go on with.  last_resort: peers that failed may be in it.  Raises NoChain."""
        ready = [] if not self.standbys.hops else [hop.hop for hop in self.standbys.alive]
        return self.replacement.best_chain(self.hops, last_resort=last_resort, standbys=ready)

    def has_choice(self) -> bool:
        """Whether there is a chain without the avoided hops."""
        try:
            return bool(self.choose().hops)
        except NoChain:
            return False

    def instead_of(self, chain: Chain) -> Chain | None:
        """The best chain by present knowledge, if it differs."""
        try:
            best = self.choose()
        except NoChain:
            return None
        return best if best.hops != chain.hops else None

    def line_up(self, chain: Chain, position: int) -> tuple[LineUp, list[Action]]:
        """Every hop of the chain in a new epoch, with its neighbours.  position: see `ResumePoint`."""
        self.epoch += 1
        peers = {hop.peer for hop in chain.hops}
        opened = [*self.opened, *self.standbys.hops]
        elsewhere = [hop for hop in opened if hop.hop.peer in peers and hop.hop not in chain.hops]
        for hop in elsewhere:
            hop.close()  # its peer serves other blocks of the session from now on
        known = {hop.hop: hop for hop in opened if hop.alive}
        states = [known.get(hop) for hop in chain.hops]
        kept = any(states)
        found = self.chooser.terms_of(chain.hops)
        dtypes = [
            state.dtype if state else terms.dtype if terms else None
            for terms, state in zip(found, states, strict=True)
        ]
        contract = self.contracts.agree(self.epoch, dtypes, kept=kept)
        packs = packs_over(found, contract) if self.terms.codec == "fast" else [0] * len(found)
        places = tuple(
            Place(hop, state, dtype, self.replacement.neighbours(chain.hops, index), pack)
            for index, (hop, state, dtype, pack) in enumerate(
                zip(chain.hops, states, dtypes, [*packs[1:], 0], strict=True)
            )
        )
        held = kept or position > 0
        return LineUp(places, self.epoch, contract, held, packs[0]), [Leave(hop) for hop in elsewhere]

    def reorder_rows(self) -> list[HopState]:
        """Steps reorder the rows from now on: the hops that cannot do it."""
        self.reorders = True
        return [hop for hop in self.opened if not hop.can_reorder]

    def check(self, hop: HopState) -> None:
        """Raises Refused where a new hop cannot serve this session."""
        if self.reorders and not hop.can_reorder:
            raise cannot_reorder(hop.hop.peer)

    def add(self, hop: HopState) -> None:
        """A new hop has taken the session."""
        self.opened.append(hop)

    def postpone_late(self, unanswered: Collection[PeerId], line_up: LineUp, seconds: float) -> list[Action]:
        """A new hop has refused the session: the other hops that are avoided too, if there are other peers.

        unanswered: peers that have not answered either, after `seconds`.  They are taken to wait for free
        cache too: asked again, they would refuse only after a further wait.
        """
        if seconds < LATE_SECONDS:
            return []
        fresh = [place.hop.peer for place in line_up.places if place.state is None]
        return [Postpone(peer, REFUSED_SECONDS) for peer in fresh if peer in unanswered]

    def are_apart(self, made: Sequence[HopState]) -> bool:
        """Whether a hop of a new route cannot reach the next hop, and this was not known before."""
        pairs = [
            (one.hop.peer, two.hop.peer) for one, two in pairwise(made) if not one.push and not one.relay
        ]
        self.replacement.separate(pairs)
        return bool(pairs)

    def take_over(
        self, line_up: LineUp, made: Sequence[HopState], point: ResumePoint, why: str, seconds: float
    ) -> tuple[Refill | None, list[Action]]:
        """The hops of a new route have agreed: their missing positions; None where all hops are new.

        point: of the resumption.  why: the reason of the change.  seconds: of the agreement.
        """
        before, self.hops, self.pack = self.hops, list(made), line_up.pack
        hops = tuple(hop.hop for hop in made)
        packs = [line_up.pack, *(place.pack for place in line_up.places[:-1])]
        self.chain = Chain(
            hops,
            self.chooser.cost(hops, {}),
            self.chooser.seconds_per_position(hops),
            *way_of(self.chooser.terms_of(hops), line_up.contract, packs),
        )
        self.replacement.adopt(hops)
        self.standbys.promote(made)
        notes = self._notes(before, why, seconds)
        if not line_up.held:
            return None, notes
        todo = plan([self.standbys.checked(hop.progress) for hop in made], point)
        from_client = todo.client_from < point.position
        for hop, order in zip(made, todo.orders, strict=True):
            hop.resume(order.length)
        notes += [
            self.replay_note(made[at].hop.peer, made[at + 1].hop.peer, start, stop)
            for at, start, stop in todo.replays
        ]
        self.refilling |= from_client or bool(todo.replays)
        bulk = tuple(hop for hop in made if hop.fed and (hop is not made[0] or from_client))
        orders = tuple(zip(made, todo.orders, strict=True))
        step = point.step if self.reorders else None
        return Refill(orders, todo.client_from, point.position, bulk, step), notes

    def leave_others(self) -> list[HopState]:
        """Leave the hops outside the present route; hops of the route may be asked anew."""
        leave = [hop for hop in self.opened if hop not in self.hops]
        self.opened = list(self.hops)
        for hop in leave:
            hop.close()
        for hop in self.hops:
            hop.forget_answers()
        return leave

    def why_none(self, last_error: PeerFault | Refused | None, unanswered: Sequence[PeerId]) -> Exception:
        """The reason for the lack of a sound route at the deadline.  unanswered: peers without an answer."""
        if isinstance(last_error, Refused):
            return last_error
        try:
            self.choose()
        except NoChain as missing:
            missing.explain(after=last_error)
            return missing
        if last_error is not None:
            return last_error
        late_hops = sorted(unanswered) or [hop.hop.peer for hop in self.hops]
        late = SlowPeer(f"the route could not be changed by the deadline, for {', '.join(late_hops)}")
        if late_hops:
            late.about(late_hops[0])
        return late

    @property
    def cannot_cut(self) -> bool:
        """Whether a hop's cache cannot go back to a lower position (a convolution's state)."""
        return not all(hop.progress.cut for hop in self.hops)

    def refilled(self) -> None:
        """An answer shows that no replay is under way."""
        self.refilling = False

    def carry(self, hop: HopState, result: Result, pending: Pending | None) -> list[Action]:
        """The client carries a hop's output to the next hop, which it cannot reach."""
        if result.epoch != self.epoch or hop not in self.hops or not len(result.body):
            return []
        reply: Reply = "replay" if result.replay else pending.what.reply if pending else "none"
        if pending is not None:
            pending.carry(result.timings)
        step = Step(
            self.contracts.current.session,
            result.step,
            result.position,
            reply,
            result.body,
            epoch=result.epoch,
            bulk=self.refilling or (pending is not None and pending.bulk),
            rope_length=result.rope_length if pending is None else pending.what.rope_length,
            rows=() if pending is None else pending.what.rows,
        )
        return [Carry(self.hops[self.hops.index(hop) + 1], step)]

    def replay_note(self, sender: str, peer: str, start: int, stop: int) -> Note:
        """A sender sends a peer positions [start, stop) again."""
        size = (stop - start) * self.contracts.current.row_bytes
        return Note("replayed", {"sender": sender, "peer": peer, "start": start, "stop": stop, "bytes": size})

    def _notes(self, before: Sequence[HopState], why: str, seconds: float) -> list[Action]:
        """The trace's entry of a new route."""
        relayed = [(one.hop.peer, two.hop.peer) for one, two in pairwise(self.hops) if one.relay]
        notes: list[Action] = [
            Note("relayed", {"sender": one, "peer": two})
            for one, two in self.replacement.newly_relayed(relayed)
        ]
        hops = [{"peer": hop.hop.peer, "blocks": [hop.hop.start, hop.hop.stop]} for hop in self.hops]
        said = {"hops": hops, "codec": self.contracts.current.codec, "seconds": seconds}
        if not before:
            return [*notes, Note("opened", said)]
        kept = [hop.hop.peer for hop in self.hops if hop in before]
        fresh = [hop.hop.peer for hop in self.hops if hop not in before]
        return [*notes, Note("rerouted", {"why": why, "kept": kept, "opened": fresh, **said})]


def cannot_reorder(peer: PeerId) -> Refused:
    """The reason for which a hop is of no use to a session that reorders its rows."""
    return Refused(f"{peer} cannot reorder the rows of a session, its version is too old")
