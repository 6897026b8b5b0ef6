"""How hidden states travel when hops of other dtypes come and go: nothing is lost but by the hops."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
import trio
import trio.testing

import client.session.hop_link
import node.serving.sessions.worker
from routing.chains.distances import CLIENT
from routing.chains.link_speeds import LinkSpeeds
from routing.names import PeerId
from tensor_codec.codecs import decode_hidden, decode_rows, encode_hidden
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


SLOW = 1000  # bytes per second: a token waits for its bytes
SLOWISH = 12_000  # two tokens do
ALL = frozenset({("client", "a"), ("a", "b"), ("b", "c")})


class Packed(Expected):
    """The same with int8o over some of the links; the last hop answers exactly.

    links: pairs of parts.  least: positions of a step that is packed.
    """

    def __init__(self, links=ALL, least=1):
        super().__init__(a=False, b=False, c=False)
        self.links, self.least = links, least

    def step(self, hidden):
        before = "client"
        for name, part in self.parts.items():
            if (before, name) in self.links and hidden.shape[1] >= self.least:
                hidden = packed(hidden)
            hidden, before = part.step(hidden), name
        return hidden


def slow_links(world, speed=SLOW, *names):
    """Links of this speed between all these peers, from the client on."""
    peers = [CLIENT, *map(PeerId, names or (*"ABC", *"abc"))]
    for one in peers:
        for two in peers:
            world.speeds.learn([one, two], [speed])


@pytest.fixture
def sent(monkeypatch):
    """Of each step that was sent, from hop to hop too: its positions and whether it was packed."""
    found = []

    def note(step):
        found.append((step.position, step.packed, step.reply == "replay"))
        return encode_step(step)

    for module in (client.session.hop_link, node.serving.sessions.worker):
        monkeypatch.setattr(module, "encode_step", note)
    return found


@pytest.mark.parametrize(("speed", "least"), [(SLOW, 1), (SLOWISH, 2)])
@pytest.mark.parametrize("batch", [1, 2])
async def test_prompts_are_packed_over_slow_links_and_tokens_where_one_row_waits_too(
    speed, least, batch, autojump_clock, sent
):
    async with swarm() as world:
        for name in "ABC":
            add(world, name)
        slow_links(world, speed)
        session = await world.open(codec="fast", batch=batch, max_length=600)
        expected, hidden = Packed(least=-(-least // batch)), some_hidden(310, batch)
        for begin, stop in ((0, 300), (300, 301), (301, 310)):
            step = hidden[:, begin:stop]
            assert torch.equal(await session.step(step), expected.step(step))
        assert not torch.equal(packed(hidden), hidden)
        assert [each[1] for each in sent] == [True] * 3 + [batch >= least] * 3 + [True] * 3
        await session.aclose()


async def test_only_the_slow_link_of_a_chain_is_packed(autojump_clock, sent):
    async with swarm() as world:
        for name in "ABC":
            add(world, name)
        slow_links(world, 10**9)
        world.speeds = LinkSpeeds()
        world.speeds.learn([CLIENT, *map(PeerId, "ABC")], [10**9, SLOW, 10**9])
        session = await world.open(codec="fast")
        expected, hidden = Packed(links={("a", "b")}), some_hidden(9)
        assert torch.equal(await session.step(hidden), expected.step(hidden))
        assert [each[1] for each in sent] == [False, True, False]
        await session.aclose()


@pytest.mark.parametrize(
    ("codec", "seconds", "old"),
    [
        ("auto", 0.04, "ABC"),
        ("exact", 0.04, ""),
        ("auto", 0.04, ""),
        ("fast", 1e-4, ""),
        ("fast", 0.04, "ABC"),
    ],
)
async def test_without_leave_on_near_links_and_for_older_servers_nothing_is_lost(
    codec, seconds, old, autojump_clock
):
    async with swarm() as world:
        world.link_seconds = seconds
        world.old |= set(map(PeerId, old))
        for name in "ABC":
            add(world, name)
        if seconds > 0.01:
            slow_links(world)
        session = await world.open(codec=codec)
        expected = Expected(a=False, b=False, c=False)
        for seed in range(3):
            step = some_hidden(2, seed=seed)
            assert torch.equal(await session.step(step), expected.step(step))
        await session.aclose()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("old", [False, True])
async def test_a_replay_sends_the_values_that_were_sent_in_int8o_whatever_the_new_hop_reads(
    old, victim, carried, batch, autojump_clock, sent
):
    async with swarm() as world:
        for name in "ABC":
            add(world, name)
        if carried:
            world.unreachable |= {(PeerId(x), PeerId(y)) for x in "ABCabc" for y in "ABCabc"}
        slow_links(world)
        session = await world.open(codec="fast", batch=batch, max_length=600)
        expected = Packed({("client", "a")} if carried else ALL)  # the client carries outputs as they came
        hidden = some_hidden(308, batch)
        for begin, stop in ((0, 300), (300, 301), (301, 302)):
            step = hidden[:, begin:stop]
            assert torch.equal(await session.step(step), expected.step(step))
        if old:
            world.old.add(PeerId(victim))
        add(world, victim)
        await lose(world, victim.upper())
        expected.replace(victim, narrow=False)
        before = expected.links
        if old:
            expected.links = {link for link in before if link[1] != victim}
        # A step that was encoded before the loss was known has lost what int8o loses.
        step = hidden[:, 302:303]
        given = packed(step) if old and ("client", victim) in before else step
        assert torch.equal(await session.step(step), expected.step(given))
        for at in range(303, 308):
            token = hidden[:, at : at + 1]
            assert torch.equal(await session.step(token), expected.step(token))
        (change,) = session.trace.of("rerouted")
        assert change.data["codec"] == "fp32"
        assert [each for each in sent if each[2]]  # there was a replay
        assert not any(is_packed for _, is_packed, replay in sent if replay)
        await session.aclose()


async def test_where_int8o_saves_no_bytes_the_slowest_link_stays_exact(autojump_clock, sent):
    async with swarm() as world:
        for name in "ABC":
            add(world, name, **NARROW)
        slow_links(world, 1)
        session = await world.open(codec="fast")  # four values in bf16 take as many bytes as in int8o
        expected, hidden = Expected(), some_hidden(8)
        assert torch.equal((await session.step(hidden)).float(), expected.step(hidden))
        assert session.route.contract.codec == "bf16"
        assert [each[1] for each in sent] == [False] * 3
        await session.aclose()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
async def test_a_hop_keeps_the_values_that_the_next_one_gets(codec, tokens, autojump_clock, monkeypatch):
    pushed = []

    def note(step):
        pushed.append(step)
        return encode_step(step)

    monkeypatch.setattr(node.serving.sessions.worker, "encode_step", note)
    async with swarm() as world:
        add(world, "a")
        add(world, "b")
        client, _ = await RawClient.open(world, "a", codec=codec, successor="b", pack=1)
        body = encode_hidden(some_hidden(tokens) / 7, codec)
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", body)))
        await until(lambda: bool(pushed))
        (hop,) = world.nodes[PeerId("a")].listener._sessions.all()
        arrived = decode_hidden(pushed[0].body, hop.contract, packed=True)
        kept = decode_hidden(hop.kept.journal.read(0, tokens, before=0), hop.contract)
        assert pushed[0].packed
        assert torch.equal(kept, arrived)
        assert hop.kept.answer.packed is None  # a retry sends the same values, and nothing is held twice
        await client.stream.aclose()


async def test_the_links_of_a_session_tell_their_speeds_to_later_ones(autojump_clock):
    async with swarm() as world:
        for name in "ABC":
            add(world, name)
        session = await world.open(codec="fast", max_length=600)
        for hop, speed in zip("ABC", (3000, 2000, 0), strict=True):
            for stream in world.nodes[PeerId(hop)].streams:
                stream.speed = speed  # as if its next frames were long and came slowly
        await session.step(some_hidden(300))
        assert world.speeds.of(CLIENT, PeerId("A")) == 3000
        assert world.speeds.of(PeerId("A"), PeerId("B")) == 2000
        assert world.speeds.of(PeerId("B"), PeerId("C")) == 0
        await session.aclose()


async def test_rows_that_no_encoding_gives_end_a_session_and_blame_its_client(autojump_clock):
    async with swarm() as world:
        add(world, "a")
        client, _ = await RawClient.open(world, "a", codec="fp32")
        good = encode_hidden(some_hidden(1), "int8o")
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", good, packed=True)))
        assert len((await client.receive(world)).body) == 4 * HIDDEN
        bad = b"\x80" + bytes(good)[1:]
        await client.stream.send(encode_step(Step(bytes(16), 1, 1, "all", bad, packed=True)))
        failed = await client.receive(world)
        assert isinstance(failed, Failed)
        assert "received hidden states hold the code -128, -127 to 127 are allowed" in failed.message
        await client.stream.aclose()


@pytest.mark.parametrize("pack", [0, 1])
async def test_a_node_that_loses_nothing_packs_for_nobody_and_refuses_what_is_packed(
    pack, autojump_clock, sent
):
    async with swarm() as world:
        for name in "ab":
            add(world, name)
        world.nodes[PeerId("a")].listener.packs = False
        client, _ = await RawClient.open(world, "a", codec="fp32", successor="b", pack=pack)
        await client.stream.send(encode_step(Step(bytes(16), 0, 0, "all", bytes(4 * HIDDEN))))
        await until(lambda: bool(sent))
        assert sent == [(0, False, False)]
        body = encode_hidden(some_hidden(1), "int8o")
        await client.stream.send(encode_step(Step(bytes(16), 1, 1, "all", body, packed=True)))
        failed = await client.receive(world)
        while not isinstance(failed, Failed) or failed.code != "message":
            failed = await client.receive(world)
        assert "a step in int8o, which this node does not take (--codec exact)" in failed.message
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
