"""A client's session without streams: a chooser over fixed hops, and hops that agree to every order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from client.chains.avoided_peers import AvoidedPeers
from client.chains.chooser import HopTerms
from client.session.core import ClientSession, State
from client.session.hop_state import HopState
from client.session.repair.contracts import Contracts
from client.session.route_state import LineUp, RouteState
from client.session.steps import Pending
from client.session.terms import Terms
from routing.blocks import Blocks
from routing.chains.hops import Chain, Hop, NoChain
from routing.names import PeerId
from tensor_codec.messages.contract import Contract, StepRange
from tensor_codec.messages.session import Opened, Relinked, Result

BLOCKS, HIDDEN, MAX_LENGTH = 6, 4, 64
WHOLE = Blocks(0, BLOCKS)
ROW = HIDDEN * 4


class Peers:
    """A chooser: of the peers that serve a gap the one that costs least, each for one run of blocks.

    held: for each peer its blocks.  seconds: of a step, for each peer; 1 where it is not said.
    """

    def __init__(self, held: Mapping[str, tuple[int, int]], **seconds: float) -> None:
        self.held = {PeerId(peer): blocks for peer, blocks in held.items()}
        self.seconds = seconds
        self.position_seconds = 1.0  # of a prompt, in one block
        self.dtypes: dict[str, str] = {}
        self.codecs: dict[str, tuple[str, ...]] = {}
        self.link_seconds, self.link_speed = 0.0, 0.0
        self.asked: list[dict[str, object]] = []
        self.blame = AvoidedPeers()

    def choose(
        self,
        start: int,
        stop: int,
        *,
        excluded: frozenset[PeerId] = frozenset(),
        last_resort: bool = False,
        kinds: frozenset[str] = frozenset(),
        tokens: int = 0,
        other_hops: int = 0,
        observed: Mapping[PeerId, float] | None = None,
    ) -> Chain:
        """A run of hops over [start, stop)."""
        self.asked.append(
            {
                "start": start,
                "stop": stop,
                "excluded": excluded,
                "tokens": tokens,
                "others": other_hops,
                "kinds": kinds,
                "last_resort": last_resort,
            }
        )
        hops: list[Hop] = []
        while start < stop:
            fit = [p for p, (a, b) in self.held.items() if a <= start < b and p not in excluded]
            fit = [peer for peer in fit if peer not in {hop.peer for hop in hops}]
            if not fit:
                raise NoChain([Blocks(start, stop)], BLOCKS, alone=False)
            best = min(fit, key=lambda peer: (self._cost(peer, observed or {}), peer))
            hops.append(Hop(best, start, min(stop, self.held[best][1])))
            start = hops[-1].stop
        return Chain(tuple(hops), self.cost(hops, observed or {}))

    def seconds_per_position(self, hops: Sequence[Hop]) -> float:
        """See `Chooser.seconds_per_position`."""
        return sum(self.position_seconds * (hop.stop - hop.start) for hop in hops)

    def cost(self, hops: Sequence[Hop], observed: Mapping[PeerId, float]) -> float:
        """Seconds of a step."""
        return sum(self._cost(hop.peer, observed) * (hop.stop - hop.start) for hop in hops)

    def _cost(self, peer: PeerId, observed: Mapping[PeerId, float]) -> float:
        return observed.get(peer, self.seconds.get(peer, 1.0))

    def kind_of(self, peer: PeerId) -> str | None:
        """Its dtype."""
        return self.dtypes.get(peer, "float32") if peer in self.held else None

    def terms_of(self, hops: Sequence[Hop]) -> list[HopTerms | None]:
        """float32, the codecs of every version, and links without delay, where nothing else was said."""
        return [
            HopTerms(
                self.dtypes.get(hop.peer, "float32"),
                self.codecs.get(hop.peer, ()),
                self.link_seconds,
                self.link_speed,
            )
            if hop.peer in self.held
            else None
            for hop in hops
        ]


HELD = {"A": (0, 2), "B": (2, 4), "C": (4, 6), "a": (0, 2), "b": (2, 4), "c": (4, 6)}


def new_session(
    peers: Peers | None = None, *, codec: str = "fp32", batch: int = 1, run: Blocks = WHOLE
) -> ClientSession:
    """A session that has no route yet."""
    peers = peers or Peers(HELD)
    terms = Terms("m", "r", run, HIDDEN, batch, MAX_LENGTH, codec)
    contract = Contract(bytes(16), run.start, run.stop, batch, MAX_LENGTH, HIDDEN, terms.kept_codec, 2048)
    return ClientSession(terms, peers, RouteState(terms, peers, Contracts(codec, contract)))


def agree(
    session: ClientSession, line_up: LineUp, lengths: Mapping[str, int] | None = None, *, cut: bool = True
) -> list[HopState]:
    """All hops of a new route agree.  lengths: of the caches of hops that go on; else as the session has."""
    made = []
    for place in line_up.places:
        near = place.neighbours
        if place.state is None:
            state = HopState(place.hop, place.dtype or "", line_up.contract.codec, near)
            state.opened(Opened(push=near.successor is not None, cut=cut))
            session.route.add(state)
        else:
            state = place.state
            state.relink(near)
            length = (lengths or {}).get(place.hop.peer, session.steps.length)
            said = Relinked(line_up.epoch, near.successor is not None, length, 0, None, cut)
            state.relinked(said, line_up.contract.codec)
        made.append(state)
    return made


def change_route(session: ClientSession, now: float, *, cut: bool = True) -> list[object]:
    """One undisturbed change of the route; the actions at its end."""
    try:
        chain = session.route.choose()
    except NoChain:
        chain = session.route.choose(last_resort=True)
    session.begin_switch()
    line_up, _ = session.route.line_up(chain, session.steps.resume_point().position)
    session.take_over(line_up, agree(session, line_up, cut=cut), 0.0)
    actions: list[object] = list(session.send_again(now))
    session.end_switch(now, None, done=True)
    return actions


def sound_session(peers: Peers | None = None, *, cut: bool = True, codec: str = "fp32") -> ClientSession:
    """A session that was opened along the best chain."""
    session = new_session(peers, codec=codec)
    change_route(session, 0.0, cut=cut)
    assert session.state is State.SOUND
    return session


def submitted(session: ClientSession, tokens: int = 1, now: float = 1.0) -> Pending:
    """A step that follows the steps sent before."""
    pending = list(session.steps.pending.values())
    position = pending[-1].what.position + pending[-1].what.tokens if pending else session.steps.length
    step, _ = session.submit(StepRange(position, tokens), bytes(tokens * ROW), now)
    return step


def answer_to(session: ClientSession, pending: Pending, *, epoch: int | None = None) -> Result:
    """The right answer of the last hop."""
    what = pending.what
    return Result(
        pending.step,
        what.reply_position,
        bytes(what.reply_tokens * ROW),
        ((10, 5),) * len(session.route.hops),
        epoch=session.route.epoch if epoch is None else epoch,
    )
