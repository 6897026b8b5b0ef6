"""Looks for the standbys of a session's hops, and has them fed: in the background, beside its steps.

`keep_standbys` runs as long as the session.  The client feeds the standby of the first hop from its own
journal; each hop feeds that of the next one (`node.serving.sessions.moving.standby`).
"""

from __future__ import annotations

import trio

from client.session.actions import Leave, Lost
from client.session.core import State
from client.session.hop_state import HopState, Neighbours
from client.session.repair.replay_plan import good_length
from client.session.route import OPEN_SECONDS, Route, seconds_to_open
from client.session.route_state import LineUp, Place
from routing.chains.hops import NoChain
from tensor_codec.codecs import recode
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.messages.contract import REPLAY_TOKENS
from tensor_codec.messages.session import (
    PUSH_PROTOCOL,
    Feed,
    Resume,
    Step,
    encode_feed,
    encode_resume,
    encode_step,
)

LOOK_SECONDS = 0.1  # between two looks at the hops
FEED_SECONDS = 0.05  # between two looks at the client's journal, as at a hop


async def keep_standbys(route: Route) -> None:
    """Have a standby for every hop, as far as there are peers, until the session is closed."""
    core = route.core
    while core.state is not State.CLOSED:
        state = core.route
        if core.state is State.SOUND and not state.reorders and state.hops:
            route.apply([Leave(hop) for hop in state.standbys.leave_others(state.hops)])
            for index in range(len(state.hops)):
                if core.state is State.SOUND and not await _look_at(route, index):
                    break
        await trio.sleep(LOOK_SECONDS)


async def _look_at(route: Route, index: int) -> bool:
    """Bring the standby of one hop a step further; False where the route has changed meanwhile."""
    state, standbys = route.core.route, route.core.route.standbys
    epoch, hop = state.epoch, state.hops[index]
    if not _may_have_one(state.hops, index):
        return True
    standby = standbys.of(hop.hop.blocks)
    if standby is None:
        await _open_one(route, hop)
        if (standby := standbys.of(hop.hop.blocks)) is None:
            return state.epoch == epoch
    if standbys.epochs.get(standby) == epoch:
        return True
    async with route.changing:
        if state.epoch != epoch or route.core.state is not State.SOUND or not standby.alive:
            return False
        try:
            position = 0 if standbys.agreed[standby] == epoch else await _relink(route, standby, hop)
            standbys.fed(standby, epoch)
            await _feed(route, standby, index, position)
        except (PeerFault, Refused) as error:
            route.tell(Lost(standby, error, blame=False))
    return True


def _may_have_one(hops: list[HopState], index: int) -> bool:
    """Whether a standby of a hop could be fed by the hop before, and reach the next one."""
    hop = hops[index]
    return hop.progress.cut and not hop.relay and (not index or hop.near.predecessor is not None)


async def _open_one(route: Route, hop: HopState) -> None:
    """Open the session at a peer with the blocks of a hop, where there is one."""
    core, state = route.core, route.core.route
    standbys, now, epoch = state.standbys, trio.current_time(), state.epoch
    used = {each.hop.peer for each in [*state.opened, *standbys.hops]}
    kind, blocks = route.swarm.kind_of(hop.hop.peer), hop.hop.blocks
    try:
        chain = route.swarm.choose(
            *blocks,
            excluded=standbys.avoided(now) | used,
            kinds=state.replacement.kinds,
            tokens=core.terms.cache_tokens,
        )
    except NoChain:
        return
    if len(chain.hops) > 1:
        return
    found = chain.hops[0]
    (terms,) = route.swarm.terms_of([found])
    if terms is None or terms.dtype != hop.dtype or route.swarm.kind_of(found.peer) != kind:
        return standbys.avoid(found.peer, now)  # its tokens could be others
    near = Neighbours(hop.near.predecessor, hop.near.successor, relay=False)
    place = Place(found, None, terms.dtype, near, follows=True)
    try:
        with trio.move_on_after(seconds_to_open(route, place, OPEN_SECONDS)) as waited:
            await route.open(LineUp((place,), epoch, state.contracts.current, held=False), place)
        if waited.cancelled_caught:
            standbys.avoid(found.peer, now)
    except (PeerFault, Refused):
        standbys.avoid(found.peer, now)
    if core.state is State.CLOSED or state.reorders:  # meanwhile
        route.apply([Leave(hop) for hop in standbys.give_up()])
    return None


async def _relink(route: Route, standby: HopState, hop: HopState) -> int:
    """Give a standby its hop's neighbours in this epoch; its true positions.  Raises PeerFault."""
    state = route.core.route
    near = Neighbours(hop.near.predecessor, hop.near.successor, relay=False)
    place = Place(standby.hop, standby, standby.dtype, near, follows=True)
    line_up = LineUp((place,), state.epoch, state.contracts.current, held=True)
    await route.relink(line_up, place, standby)
    progress = state.standbys.checked(standby.progress)
    length = good_length(progress, route.core.steps.resume_point())
    await route.link(standby).send(encode_resume(Resume(state.epoch, length)))
    state.standbys.agree(standby, state.epoch)
    return length


async def _feed(route: Route, standby: HopState, index: int, position: int) -> None:
    """Have a standby fed from `position` on.  Raises PeerFault of the standby."""
    state = route.core.route
    if not index:
        route.nursery.start_soon(_feed_first, route, standby, state.epoch, position)
        return
    sender, order = state.hops[index - 1], Feed(state.epoch, standby.hop.peer, position)
    try:
        await route.link(sender).send(encode_feed(order))
    except PeerFault as fault:
        route.tell(Lost(sender, fault))


async def _feed_first(route: Route, standby: HopState, epoch: int, position: int) -> None:
    """Send the standby of the first hop its inputs, in the background, while the route stays as it is."""
    core, journal = route.core, route.journal
    contract, at, stream = core.route.contracts.current, position, None
    try:
        stream = await route.swarm.open_stream(standby.hop.peer, PUSH_PROTOCOL)
        while core.route.epoch == epoch and standby.alive and not journal.reordered:
            at = min(at, journal.take_changed())
            if at >= journal.stop:
                await trio.sleep(FEED_SECONDS)
                continue
            part = min(REPLAY_TOKENS, contract.max_tokens)
            start, at, rope_length = next(journal.parts(at, journal.stop, part))
            body = recode(
                bytes(journal.read(start, at)), core.terms.kept_codec, contract.codec, contract.hidden
            )
            step = Step(
                contract.session, max(0, core.steps.next_step - 1), start, "replay", body, (), epoch, True,
                rope_length,
            )  # fmt: skip
            await stream.send(encode_step(step), route.limits.session_idle_seconds)
    except PeerFault as fault:
        route.tell(Lost(standby, fault, blame=False))
    finally:
        if stream is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await stream.aclose()
