"""Sessions whose rows change their order, as in a beam search, and that outlive their hops all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
import trio
from torch import Tensor

from client.session.hop_state import HopState
from client.session.session import Session
from routing.chains.hops import NoChain
from routing.names import PeerId
from tensor_codec.errors import BadResult, Refused
from tensor_codec.header import pack_header
from tensor_codec.messages import session as session_messages
from tensor_codec.messages.session import Opened
from tests.fakes_serving import FakeCompute, World, some_hidden, swarm, whole_model

BLOCKS, BATCH = 9, 3
# Permutations, repeated rows, all from one, and steps without an order; going back, or not.
STEPS = (
    (5, 0, None),
    (1, 0, (2, 0, 1)),
    (1, 0, (0, 0, 2)),
    (1, 0, None),
    (2, 1, (1, 1, 1)),
    (1, 0, (2, 2, 0)),
    (1, 3, (0, 2, 2)),
)


def replicas(world: World, seconds: float = 0.0) -> World:
    """Two nodes for each third of the model; those in capitals come first."""
    for names, start in (("Aa", 0), ("Bb", 3), ("Cc", 6)):
        for name in names:
            world.add(name, start, start + 3, seconds=seconds)
    return world


@dataclass
class Rows:
    """A session beside a plain list of what each of its rows was given."""

    session: Session
    given: Tensor = field(default_factory=lambda: some_hidden(0, BATCH))
    seed: int = 0

    async def step(
        self, tokens: int, back: int, rows: Sequence[int] | None, seconds: float | None = None
    ) -> None:
        """A step whose answer is that of the whole model, for what each row was given."""
        position = self.given.shape[1] - back
        self.seed += 1
        hidden = some_hidden(tokens, BATCH, self.seed)
        found = await self.session.step(hidden, position, rows=rows, seconds=seconds)
        before = self.given[:, :position]
        self.given = torch.cat([before if rows is None else before[list(rows)], hidden], dim=1)
        assert torch.equal(found, whole_model(self.given, 0, BLOCKS)[:, position:])


def peers_of(session: Session) -> str:
    return " ".join(hop.peer for hop in session.chain.hops)


async def test_rows_go_on_from_the_rows_that_an_order_names(autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world).open(batch=BATCH))
        for step in STEPS:
            await rows.step(*step)
        assert rows.session.core.route.epoch == 1, "the route did not change"
        await rows.session.aclose()


@pytest.mark.parametrize("victims", ["A", "B", "C", "AB", "BC", "AC", "ABC"])
@pytest.mark.parametrize("at", [1, 2, 4, 6])
@pytest.mark.parametrize("when", [0.5, 1.5, 2.5])
async def test_any_hops_may_die_in_the_middle_of_a_step_that_reorders(victims, at, when, autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world, seconds=1).open(batch=BATCH))

        async def kill():
            await trio.sleep(when)
            for victim in victims:
                await world.kill(victim)

        async with trio.open_nursery() as nursery:
            for index, step in enumerate(STEPS):
                if index == at:
                    nursery.start_soon(kill)
                await rows.step(*step)
        assert len(list(rows.session.trace.of("rerouted"))) == 1
        await rows.session.aclose()


@pytest.mark.parametrize("apart", [[("A", "B")], [("B", "C")], [("A", "B"), ("B", "C")]])
async def test_rows_are_reordered_beyond_hops_that_cannot_reach_each_other(apart, autojump_clock):
    async with swarm() as world:
        replicas(world)
        for one, two in apart:
            for name in (one, one.lower()):
                for other in (two, two.lower()):
                    world.unreachable.add((PeerId(name), PeerId(other)))
        rows = Rows(await world.open(batch=BATCH))
        for victim, step in zip([None, None, "B", None, "A", "C", None], STEPS, strict=True):
            if victim is not None:
                await world.kill(victim)
            await rows.step(*step)
        assert rows.session.relay
        await rows.session.aclose()


@pytest.mark.parametrize("leave_at", [0.5, 1.5, 2.5, 3.5])
@pytest.mark.parametrize("victim", [None, "A", "B", "C"])
async def test_a_step_that_was_given_up_has_reordered_nothing(leave_at, victim, autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world, seconds=1).open(batch=BATCH))
        for step in STEPS[:4]:
            await rows.step(*step)
        with trio.move_on_after(leave_at):
            await rows.session.step(some_hidden(1, BATCH, 99), rows=(0, 0, 1))
        if rows.session.length == rows.given.shape[1] + 1:
            assert leave_at == 3.5, "it was answered in time"
            await rows.session.aclose()
            return
        if victim is not None:
            await world.kill(victim)
        for step in STEPS[4:]:
            await rows.step(*step)
        await rows.session.aclose()


async def test_a_step_whose_answer_cannot_be_read_has_reordered_nothing(autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world).open(batch=BATCH))
        await rows.step(5, 0, None)
        with (
            mock.patch.object(Session, "decode", side_effect=BadResult("NaN")),
            pytest.raises(BadResult, match="NaN"),
        ):
            await rows.session.step(some_hidden(1, BATCH, 99), rows=(0, 0, 1))
        assert rows.session.length == 5
        for step in STEPS[1:]:
            await rows.step(*step)
        await rows.session.aclose()


async def test_a_step_that_is_left_while_its_answer_is_read_has_reordered_nothing(autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world).open(batch=BATCH))
        await rows.step(5, 0, None)
        rows.session.compute = FakeCompute(1.0)
        with trio.move_on_after(1.5) as left:
            await rows.session.step(some_hidden(1, BATCH, 99), rows=(0, 0, 1))
        assert left.cancelled_caught
        assert rows.session.length == 5
        for step in STEPS[1:]:
            await rows.step(*step)
        await rows.session.aclose()


@pytest.mark.parametrize("hop", ["A", "B", "C"])
async def test_an_order_is_applied_once_where_a_hop_has_no_room_for_the_step(hop, autojump_clock):
    async with swarm() as world:
        rows = Rows(await replicas(world).open(batch=BATCH))
        await rows.step(16, 0, None)
        budget = world.nodes[PeerId(hop)].budget
        budget.tokens = BATCH * 16  # all of which the session holds
        await rows.step(1, 0, (1, 1, 0))
        await rows.step(1, 0, (1, 1, 0))
        assert hop.lower() in peers_of(rows.session)
        budget.tokens = 10**6
        await rows.session.aclose()


async def test_an_order_is_taken_while_no_other_step_is_on_its_way(autojump_clock):
    async with swarm() as world:
        session = await replicas(world, seconds=1).open(batch=BATCH)
        rows = Rows(session)
        await rows.step(3, 0, None)
        hidden = some_hidden(1, BATCH, 5)
        pending = await session.submit(session.encode(hidden), 3, 1, "all")
        with pytest.raises(ValueError, match="rows are reordered while no step is on its way, 1 are"):
            await session.submit(session.encode(hidden), 4, 1, "all", rows=(1, 0, 2))
        await session.collect(pending)
        rows.given = torch.cat([rows.given, hidden], dim=1)
        await rows.step(1, 0, (1, 0, 2))
        await session.aclose()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ((0, 1), r"rows is \[0, 1\], 3 numbers in 0..2 are needed"),
        ((0, 1, 3), r"rows is \[0, 1, 3\], 3 numbers in 0..2 are needed"),
        ((0, 1, -1), r"rows is \[0, 1, -1\], 3 numbers"),
        ((0, 1, True), "rows is a tuple, a list of 3 whole numbers is needed"),
        ((0.0, 1.0, 2.0), "a list of 3 whole numbers is needed"),
        ("012", "rows is a str, a list of 3 whole numbers is needed"),
        (1, "rows is a int, a list of 3 whole numbers is needed"),
    ],
)
async def test_an_order_that_cannot_be_is_refused_before_anything_is_sent(rows, why, autojump_clock):
    async with swarm() as world:
        session = await replicas(world).open(batch=BATCH)
        await session.step(some_hidden(2, BATCH))
        with pytest.raises(ValueError, match=why):
            await session.step(some_hidden(1, BATCH), rows=rows)
        assert torch.equal(
            await session.step(some_hidden(1, BATCH), 0, rows=torch.tensor([1, 0, 2]).tolist()),
            whole_model(some_hidden(1, BATCH), 0, BLOCKS),
        ), "below position 0 there is nothing to reorder"
        await session.aclose()


# Hops of the version before, which do not know of orders.


@contextmanager
def old(*names: str) -> Iterator[None]:
    """These nodes do not say that they can reorder rows."""
    opened = HopState.opened

    def opened_by_old(self: HopState, reply: Opened) -> None:
        opened(self, replace(reply, rows=reply.rows and self.hop.peer not in names))

    with mock.patch.object(HopState, "opened", opened_by_old):
        yield


async def test_a_hop_that_cannot_reorder_is_left_before_the_first_order_and_not_taken_again(autojump_clock):
    with old("B", "c"):
        async with swarm() as world:
            rows = Rows(await replicas(world).open(batch=BATCH))
            await rows.step(4, 0, None)
            await rows.step(1, 0, (0, 1, 2))
            assert peers_of(rows.session) == "A B C", "an order that changes nothing is none"
            await rows.step(1, 0, (1, 1, 0))
            assert peers_of(rows.session) == "A b C"
            await world.kill("C")
            with pytest.raises(NoChain, match="6:9"):
                await rows.step(1, 0, (1, 1, 0), seconds=5)
            world.revive("C")
            await rows.step(1, 0, (1, 1, 0))
            assert peers_of(rows.session) == "A b C"
            await rows.session.aclose()


async def test_where_no_hop_can_reorder_the_error_says_so(autojump_clock):
    with old("C", "c"):
        async with swarm() as world:
            rows = Rows(await replicas(world).open(batch=BATCH))
            await rows.step(4, 0, None)
            with pytest.raises(
                Refused, match="c cannot reorder the rows of a session, its version is too old"
            ):
                await rows.step(1, 0, (1, 1, 0), seconds=5)
            await rows.session.aclose()


async def test_a_session_without_orders_stays_with_hops_that_cannot_reorder(autojump_clock):
    with old(*"AaBbCc"):
        async with swarm() as world:
            rows = Rows(await replicas(world).open(batch=BATCH))
            await rows.step(4, 0, None)
            await world.kill("B")
            await rows.step(1, 1, None)
            assert peers_of(rows.session) == "A b C"
            await rows.session.aclose()


async def test_no_message_has_a_key_more_where_rows_stay(autojump_clock):
    """A peer of the version before gets what it always got; of a batch it is told what it may ignore."""
    async with swarm() as world:
        sent: list[list[str]] = []

        def noted(fields):
            sent.append([str(fields["k"]), *fields])
            return pack_header(fields)

        with mock.patch.object(session_messages, "pack_header", noted):
            session = await replicas(world).open(batch=1)
            await session.step(some_hidden(4))
            await world.kill("B")
            await session.step(some_hidden(1))
            await session.aclose()
        kinds = {kind for kind, *_ in sent}
        assert kinds == {"open", "opened", "step", "result", "relink", "relinked", "resume", "close"}
        assert [kind for kind, *keys in sent if "w" in keys or (kind == "resume" and "n" in keys)] == []
