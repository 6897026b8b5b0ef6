"""How hidden states travel when hops of other dtypes come and go: nothing is lost but by the hops."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import trio
import trio.testing

import node.serving.sessions.worker
from routing.names import PeerId
from tensor_codec.codecs import decode_rows, encode_hidden
from tensor_codec.errors import PeerGone, RemoteProtocolError
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.session import (
    Relink,
    Relinked,
    Resume,
    Step,
    encode_relink,
    encode_relinked,
    encode_resume,
    encode_step,
)
from tests.fakes_serving import HIDDEN, FakeCache, FakeSpan, RawClient, some_hidden, swarm, until

NARROW = {"dtype": "bfloat16"}
SPANS = {"a": (0, 3), "b": (3, 6), "c": (6, 9)}


def rounded(hidden):
    return hidden.bfloat16().float()


def add(world, name, **served):
    """A node for a third of the model.  What computes in bfloat16 rounds what comes in and what goes out."""
    node = world.add(name, *SPANS[name[0].lower()], **served)
    if served.get("dtype") == "bfloat16":
        exact = node.span.forward
        node.span.forward = lambda hidden, *rest, **how: rounded(exact(rounded(hidden), *rest, **how))
    return node


class Part:
    """A hop as it should be: what it was given, and what it makes of that."""

    def __init__(self, name, narrow):
        self.start, self.stop = SPANS[name]
        self.narrow, self.span, self.given = narrow, FakeSpan(self.start, self.stop), []
        self.cache = None

    def step(self, hidden):
        self.given.append(hidden)
        self.cache = self.cache or FakeCache(hidden.shape[0], 4096)
        hidden = rounded(hidden) if self.narrow else hidden
        made = self.span.forward(hidden, self.cache, self.cache.length, self.start, self.stop)
        return rounded(made) if self.narrow else made


class Expected:
    """The whole chain in one place: nothing is lost between its parts."""

    def __init__(self, **narrow):
        self.parts = {name: Part(name, narrow.get(name, True)) for name in SPANS}

    def step(self, hidden):
        for part in self.parts.values():
            hidden = part.step(hidden)
        return hidden

    def replace(self, name, *, narrow):
        """Another hop takes over with all that this one was given."""
        given, part = self.parts[name].given, Part(name, narrow)
        for hidden in given:
            part.step(hidden)
        self.parts[name] = part


async def lose(world, name):
    await world.kill(name)
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_nothing_is_lost_when_a_hop_in_float32_replaces_one_in_bfloat16(
    victim, carried, batch, autojump_clock
):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, **NARROW)
        if carried:
            world.unreachable |= {(PeerId(x), PeerId(y)) for x in "ABCabc" for y in "ABCabc"}
        session = await world.open(codec="auto", batch=batch, max_length=600)
        expected = Expected()
        hidden = some_hidden(308, batch)  # not what bfloat16 can hold
        prompt = hidden[:, :300]
        found = await session.step(prompt)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), expected.step(prompt))
        for at in range(300, 303):
            token = hidden[:, at : at + 1]
            assert torch.equal((await session.step(token)).float(), expected.step(token))
        add(world, victim)
        await lose(world, victim.upper())
        expected.replace(victim, narrow=False)
        for at in range(303, 308):
            token = hidden[:, at : at + 1]
            found = await session.step(token)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected.step(token))
        (change,) = session.trace.of("rerouted")
        assert change.data["codec"] == "fp32"
        assert {hop.peer for hop in session.chain.hops} == {*"ABC"} - {victim.upper()} | {victim}
        await session.aclose()


@pytest.mark.parametrize("when", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
async def test_steps_under_way_when_the_codec_changes_arrive_whole(when, autojump_clock):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, seconds=1, **NARROW)
        add(world, "c", seconds=1)
        session = await world.open(codec="auto")
        narrow, mixed = Expected(), Expected(c=False)
        hidden = some_hidden(24)
        chunks = list(hidden[:, :20].split(4, 1)) + list(hidden[:, 20:].split(1, 1))

        async def kill():
            await trio.sleep(when)
            await world.kill("C")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            pending = [
                await session.submit(session.encode(chunk), 4 * index, 4, "all")
                for index, chunk in enumerate(chunks[:5])
            ]
            for one, chunk in zip(pending, chunks, strict=False):
                result = await session.collect(one)
                found = session.decode(result)
                allowed = narrow.step(chunk), mixed.step(chunk)
                assert any(torch.equal(found.float(), each) for each in allowed)
        for chunk in chunks[5:]:
            assert torch.equal(await session.step(chunk), mixed.step(chunk))
        await session.aclose()


async def test_an_answer_is_read_in_the_codec_that_was_agreed_on_when_it_was_made(autojump_clock):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, **NARROW)
        session = await world.open(codec="auto")
        expected, first = Expected(), some_hidden(3)
        pending = await session.submit(session.encode(first), 0, 3, "all")
        result = await session.collect(pending)
        add(world, "b")
        await lose(world, "B")
        await session.step(some_hidden(1, seed=1))
        assert session.route.contract.codec == "fp32"
        assert torch.equal(session.decode(result).float(), expected.step(first))  # of before the change
        await session.aclose()


async def test_when_all_hops_compute_in_bfloat16_again_the_session_stays_as_exact_as_it_was(autojump_clock):
    async with swarm() as world:
        for name, served in (("A", NARROW), ("B", {}), ("C", NARROW)):
            add(world, name, **served)
        session = await world.open(codec="auto")
        expected = Expected(b=False)
        for seed in range(3):
            step = some_hidden(2, seed=seed)
            assert torch.equal(await session.step(step), expected.step(step))
        add(world, "b", **NARROW)
        await lose(world, "B")
        expected.replace("b", narrow=True)
        for seed in range(3, 6):
            step = some_hidden(2, seed=seed)
            found = await session.step(step)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected.step(step))
        await session.aclose()


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
async def test_a_codec_that_the_user_chose_stays_whatever_the_hops_compute_in(codec, autojump_clock):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, **NARROW)
        session = await world.open(codec=codec)
        dtypes = {(await session.step(some_hidden(2))).dtype}
        add(world, "b")
        await lose(world, "B")
        dtypes |= {(await session.step(some_hidden(1, seed=seed))).dtype for seed in range(3)}
        assert dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16}[codec]}
        assert {node.listener.session_count for node in world.nodes.values() if node.alive} == {1}
        await session.aclose()


@pytest.mark.parametrize(
    ("first", "opened", "codec"),
    [({}, NARROW, "bf16"), (NARROW, {}, "fp32"), (NARROW, {"dtype": "float16"}, "fp32")],
)
async def test_the_codec_is_that_of_the_hops_that_were_opened_not_of_those_that_were_chosen_first(
    first, opened, codec, autojump_clock
):
    async with swarm() as world:
        add(world, "A", **NARROW)
        add(world, "B", **first)
        add(world, "C", **NARROW)
        add(world, "b", **opened)
        world.nodes[PeerId("B")].alive = False  # and nobody knows it yet
        session = await world.open(codec="auto")
        assert [hop.peer for hop in session.chain.hops] == ["A", "b", "C"]
        assert session.route.contract.codec == codec
        contracts = {
            hop.contract.codec for node in world.nodes.values() for hop in node.listener._sessions.all()
        }
        assert contracts == {codec}
        expected = Expected(b=opened is NARROW)
        for seed in range(3):
            step = some_hidden(2, seed=seed)
            assert torch.equal((await session.step(step)).float(), expected.step(step))
        await session.aclose()


async def test_a_hop_that_does_not_know_how_to_change_the_codec_is_replaced(autojump_clock, monkeypatch):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, **NARROW)
        session = await world.open(codec="auto")
        expected = Expected()
        for seed in range(2):
            step = some_hidden(2, seed=seed)
            assert torch.equal((await session.step(step)).float(), expected.step(step))

        def silent(message):
            return encode_relinked(replace(message, codec=None))

        monkeypatch.setattr(node.serving.sessions.worker, "encode_relinked", silent)
        for name in "abc":
            add(world, name)
        await lose(world, "B")
        for name in "abc":
            expected.replace(name, narrow=False)
        step = some_hidden(2, seed=9)
        found = await session.step(step)
        assert [hop.peer for hop in session.chain.hops] == ["a", "b", "c"]
        assert found.shape == step.shape
        assert any("cannot go on in codec fp32" in e.data["error"] for e in session.trace.of("fault"))
        await session.aclose()


# --- int8o ---


def packed(hidden):
    """What arrives of hidden states that go out in int8o."""
    return decode_rows(encode_hidden(hidden, "int8o"), "int8o", HIDDEN).view(hidden.shape)


class Packed(Expected):
    """The same with int8o between the parts and at both ends, until `widen`."""

    def __init__(self):
        super().__init__(a=False, b=False, c=False)
        self.way = packed

    def step(self, hidden):
        hidden = self.way(hidden)
        for part in self.parts.values():
            hidden = self.way(part.step(hidden))
        return hidden

    def widen(self):
        self.way = lambda hidden: hidden


def codecs_at_hops(world):
    nodes = [node for node in world.nodes.values() if node.alive]
    return {hop.contract.codec for node in nodes for hop in node.listener._sessions.all()}


async def test_a_fast_session_over_slow_links_travels_in_int8o_all_the_way(autojump_clock):
    async with swarm() as world:
        world.link_seconds = 0.04
        for name in "ABC":
            add(world, name)
        session = await world.open(codec="fast", batch=2, max_length=600)
        expected, hidden = Packed(), some_hidden(310, 2)
        for begin, stop in ((0, 300), (300, 301), (301, 310)):
            step = hidden[:, begin:stop]
            assert torch.equal(await session.step(step), expected.step(step))
        assert session.route.contract.codec == "int8o"
        assert codecs_at_hops(world) == {"int8o"}
        assert not torch.equal(packed(hidden), hidden)
        await session.aclose()


@pytest.mark.parametrize(
    ("codec", "seconds", "old"),
    [("auto", 0.04, ""), ("exact", 0.04, ""), ("fast", 1e-4, ""), ("fast", 0.04, "B")],
)
async def test_without_leave_on_near_links_and_for_older_servers_nothing_is_lost(
    codec, seconds, old, autojump_clock
):
    async with swarm() as world:
        world.link_seconds = seconds
        world.old |= {PeerId(old)}
        for name in "ABC":
            add(world, name)
        session = await world.open(codec=codec)
        expected = Expected(a=False, b=False, c=False)
        for seed in range(3):
            step = some_hidden(2, seed=seed)
            assert torch.equal(await session.step(step), expected.step(step))
        assert codecs_at_hops(world) == {"fp32"}
        await session.aclose()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("old", [False, True])
async def test_a_replay_sends_what_was_sent_in_int8o_whatever_the_new_hop_reads(
    old, victim, carried, batch, autojump_clock
):
    async with swarm() as world:
        world.link_seconds = 0.04
        for name in "ABC":
            add(world, name)
        if carried:
            world.unreachable |= {(PeerId(x), PeerId(y)) for x in "ABCabc" for y in "ABCabc"}
        session = await world.open(codec="fast", batch=batch, max_length=600)
        expected, hidden = Packed(), some_hidden(308, batch)
        for begin, stop in ((0, 300), (300, 301), (301, 302)):
            step = hidden[:, begin:stop]
            assert torch.equal(await session.step(step), expected.step(step))
        if old:
            world.old.add(PeerId(victim))
        add(world, victim)
        await lose(world, victim.upper())
        expected.replace(victim, narrow=False)
        if old:
            expected.widen()
        sent = packed(hidden[:, 302:303])  # encoded while the route was in int8o
        first = expected.step(sent if old else hidden[:, 302:303])
        assert torch.equal(await session.step(hidden[:, 302:303]), first)
        for at in range(303, 308):
            token = hidden[:, at : at + 1]
            assert torch.equal(await session.step(token), expected.step(token))
        (change,) = session.trace.of("rerouted")
        assert change.data["codec"] == ("fp32" if old else "int8o")
        assert codecs_at_hops(world) == {change.data["codec"]}
        await session.aclose()


async def test_rows_that_no_encoding_gives_end_a_session_and_blame_its_client(autojump_clock):
    async with swarm() as world:
        add(world, "a")
        client, _ = await RawClient.open(world, "a", codec="int8o")
        good = encode_hidden(some_hidden(1), "int8o")
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", good)))
        assert len((await client.receive(world)).body) == len(good)
        bad = b"\x80" + bytes(good)[1:]
        await client.stream.send(encode_step(Step(bytes(16), 1, 1, "all", bad)))
        failed = await client.receive(world)
        assert isinstance(failed, Failed)
        assert "received hidden states hold the code -128, -127 to 127 are allowed" in failed.message
        await client.stream.aclose()


# --- what a hop answers ---


def in_bf16(hidden):
    return hidden.bfloat16().view(torch.uint8).numpy().tobytes()


async def test_a_hop_brings_what_it_keeps_into_the_new_codec(autojump_clock):
    async with swarm() as world:
        add(world, "a", **NARROW)
        add(world, "b")
        client, _ = await RawClient.open(world, "a", codec="bf16", relay=True, dtype="bfloat16")
        hidden = some_hidden(5)
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", in_bf16(hidden))))
        first = await client.receive(world)
        await client.stream.send(encode_relink(Relink(1, relay=True, codec="fp32")))
        assert await client.receive(world) == Relinked(1, False, 5, 0, 0, codec="fp32")
        client.opened = replace(client.opened, codec="fp32")
        await client.stream.send(encode_resume(Resume(1, 5, 2, 5)))
        replayed = await client.receive(world)
        made = torch.frombuffer(bytearray(first.body), dtype=torch.bfloat16).float().view(5, HIDDEN)
        assert (replayed.replay, replayed.position) == (True, 2)
        assert torch.equal(torch.frombuffer(replayed.body, dtype=torch.float32).view(3, HIDDEN), made[2:])
        # The last answer too is kept: the same step again gets it.
        again = rounded(hidden).numpy().tobytes()
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", again, epoch=1)))
        repeated = await client.receive(world)
        assert torch.equal(torch.frombuffer(repeated.body, dtype=torch.float32).view(5, HIDDEN), made)
        await client.stream.aclose()


async def test_a_codec_that_loses_more_is_refused_once_the_cache_holds_anything(autojump_clock):
    async with swarm() as world:
        add(world, "a")
        client, _ = await RawClient.open(world, "a", codec="fp32")
        await client.stream.send(encode_relink(Relink(1, codec="bf16")))
        assert await client.receive(world) == Relinked(1, False, 0, 0, codec="bf16")
        await client.stream.send(encode_relink(Relink(2, codec="fp32")))
        await client.receive(world)
        await client.stream.send(encode_resume(Resume(2, 0)))
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", bytes(4 * HIDDEN), epoch=2)))
        await client.receive(world)
        await client.stream.send(encode_relink(Relink(3, codec="bf16")))
        failed = await client.receive(world)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error(), RemoteProtocolError)
        assert failed.message == "codec bf16 after fp32, which loses less"
        await client.stream.aclose()


@pytest.mark.parametrize("values", [HIDDEN, 3 * HIDDEN])
async def test_a_client_that_goes_on_in_the_old_codec_ends_its_session_and_no_more(values, autojump_clock):
    async with swarm() as world:
        add(world, "a", **NARROW)
        client, _ = await RawClient.open(world, "a", codec="bf16", dtype="bfloat16")
        await client.stream.send(encode_relink(Relink(1, codec="fp32")))
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", bytes(2 * values), epoch=1)))
        with contextlib.suppress(PeerGone):
            while await client.receive(world) is not None:
                pass
        await until(lambda: world.nodes[PeerId("a")].listener.session_count == 0)
        await client.stream.aclose()
        other, _ = await RawClient.open(
            world, "a", "other", session=b"o" * 16, codec="bf16", dtype="bfloat16"
        )
        await other.stream.send(encode_step(Step(b"o" * 16, 0, 0, "all", bytes(2 * HIDDEN))))
        assert len((await other.receive(world)).body) == 2 * HIDDEN
        await other.stream.aclose()
