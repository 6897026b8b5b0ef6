"""Servers and clients that die, freeze or leave in the midst of a generation: the tokens stay the same.

Real processes.  How long each takes is measured by `benchmarks recovery`; here every wait is generous.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
import trio
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.lib.processes import ROOT, Worker
from benchmarks.recovery.recovery import killed_again_and_again, measure, parse
from benchmarks.recovery.replicas import Replica, ReplicatedSwarm, drain, freeze, kill, replicated_swarm
from benchmarks.recovery.watched import (
    Watched,
    peers_in_use,
    trace_events,
    until_followed,
    until_known,
    watch,
)
from client.config import ClientConfig
from client.generation.conversation import Conversation
from client.swarm import Swarm, open_swarm
from node.model.blocks.forward_backward import backward, forward
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from routing.blocks import Blocks
from tensor_codec.errors import PeerGone
from tests.fault_link import WAYS
from tests.forked import Forked
from tests.in_namespaces import reference
from tests.model_fixtures import BLOCKS, VOCAB, save_tiny_tokenizer
from tests.netlab.lab import cannot
from tests.netlab.namespaces import command_inside

pytestmark = pytest.mark.process

SPANS = [(0, 3), (3, 6)]
COPIES = 3
ENOUGH = 2  # servers of each span that a test begins with
TTL_SECONDS = 6.0
LONG = 600  # tokens of a prompt that goes in several chunks
FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "8192"]
FLIP_EVERY = 8192  # bytes of a link, each way: some tens of tokens
FLIPS = 5
GENEROUS_SECONDS = 100.0
LATE_SECONDS = 15.0  # of a client on a busy machine
TOLERANCE = 5e-5  # of losses in float32 behind three steps; each gradient is within 5e-6

Expected = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that takes long prompts and never ends by itself."""
    path = tmp_path_factory.mktemp("models") / "endless-llama"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2,  # large enough that what comes next depends on what was before
    )  # fmt: skip
    whole = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    whole.save_pretrained(path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> Expected:
    """What the whole model makes of a prompt, in this process."""
    whole = AutoModelForCausalLM.from_pretrained(model)

    def generate(ids: list[int], tokens: int) -> list[int]:
        prompt = torch.tensor([ids])
        out = whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False
        )
        found: list[int] = out[0, len(ids) :].tolist()
        assert len(found) == tokens
        assert len(set(found)) > tokens / 5  # a wrong cache would show
        return found

    return generate


@pytest.fixture(scope="module")
def processes(model: Path) -> Iterator[ReplicatedSwarm]:
    network = ["--record-ttl", str(TTL_SECONDS)]
    with replicated_swarm(
        SPANS, COPIES, model=str(model), flags=FLAGS, network=network, spawn=Forked
    ) as swarm:
        yield swarm


@pytest.fixture
def servers(processes: ReplicatedSwarm) -> ReplicatedSwarm:
    """All are there or on their way back; a client waits until it knows enough of them."""
    processes.mend(wait=False)
    return processes


@asynccontextmanager
async def joined(servers: ReplicatedSwarm, model: Path, **settings: Any) -> AsyncIterator[Swarm]:
    """A client that knows `ENOUGH` servers of each span."""
    peers = settings.pop("peers", tuple(servers.peers))
    async with open_swarm(ClientConfig(peers, str(model), threads=1, **settings)) as swarm:

        def enough(view: Any) -> bool:
            known = [replica.span for replica in servers.replicas if replica.known(view)]
            return all(known.count(span) >= ENOUGH for span in SPANS)

        await until_known(swarm, enough)
        yield swarm


def prompt(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (tokens,), generator=generator).tolist()


def in_use(servers: ReplicatedSwarm, conversation: Conversation, hop: int) -> Replica:
    return servers.of(peers_in_use(conversation)[hop])


async def generate(
    swarm: Swarm, ids: Sequence[int], tokens: int, before: Callable[[int, Conversation], None]
) -> Watched:
    """A generation in a conversation of its own; `before` is called before each token is asked for."""
    conversation = swarm.conversation(len(ids) + tokens)

    async def call(number: int) -> None:
        before(number, conversation)

    try:
        return await watch(swarm, conversation, ids, tokens, call)
    finally:
        conversation.close()


async def kill_later(replica: Replica) -> None:
    """The token that is waited for is under way, for its server has been frozen."""
    await trio.sleep(0.1)
    kill(replica)


@pytest.mark.parametrize(("when", "hop"), [("first", 0), ("middle", 1), ("last", 1)])
async def test_a_server_killed_in_the_midst_of_a_token_costs_no_token(
    servers: ReplicatedSwarm, model: Path, expected: Expected, when: str, hop: int
) -> None:
    ids, tokens = prompt(12, seed=hop), 64
    number = {"first": 1, "middle": 32, "last": 63}[when]
    victims: list[Replica] = []
    async with joined(servers, model) as swarm, trio.open_nursery() as nursery:

        def before(asked: int, conversation: Conversation) -> None:
            if asked == number:
                victims.append(in_use(servers, conversation, hop))
                freeze(victims[0])
                nursery.start_soon(kill_later, victims[0])

        watched = await generate(swarm, ids, tokens, before)
        assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
        assert victims[0].peer in swarm.blame.avoided(trio.current_time())


async def test_a_server_with_a_standby_is_killed_and_nothing_is_computed_again(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids = prompt(40, seed=45)
    async with joined(servers, model, standby=True) as swarm:
        conversation = swarm.conversation(len(ids) + 24)

        async def before(number: int) -> None:
            if number == 12:
                with trio.fail_after(GENEROUS_SECONDS):
                    await until_followed(conversation)
                kill(in_use(servers, conversation, 1))

        watched = await watch(swarm, conversation, ids, 24, before)
        assert watched.error is None
        assert watched.tokens == expected(ids, 24)
        events = trace_events(conversation)
        replayed = [event.data["start"] for event in events if event.kind == "replayed"]
        assert all(start > len(ids) for start in replayed), "its standby had the prompt"
        assert [event for event in events if event.kind == "rerouted"]
        conversation.close()


@pytest.mark.parametrize("hop", [0, 1])
async def test_a_server_killed_while_a_long_prompt_is_computed_costs_no_token(
    servers: ReplicatedSwarm, model: Path, expected: Expected, hop: int
) -> None:
    ids, tokens = prompt(LONG, seed=hop + 2), 16
    async with joined(servers, model) as swarm, trio.open_nursery() as nursery:
        conversation = swarm.conversation(len(ids) + tokens)
        await watch(swarm, conversation, ids[:2], 1)  # the session is open, and nearly empty
        victim = in_use(servers, conversation, hop)
        freeze(victim)
        nursery.start_soon(kill_later, victim)
        watched = await watch(swarm, conversation, ids, tokens)
        assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
        conversation.close()


async def test_a_server_that_freezes_is_replaced_and_what_it_says_when_it_wakes_up_is_ignored(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids, tokens = prompt(12, seed=4), 64
    frozen: list[Replica] = []
    async with joined(servers, model) as swarm:

        def before(asked: int, conversation: Conversation) -> None:
            if asked == 10:
                frozen.append(in_use(servers, conversation, 1))
                freeze(frozen[0])
            if asked == 20:  # ten tokens without it
                assert frozen[0].peer not in peers_in_use(conversation)
                frozen[0].node.thaw()

        watched = await generate(swarm, ids, tokens, before)
        assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
        again = await generate(swarm, ids, tokens, lambda asked, conversation: None)
        assert again.tokens == watched.tokens


async def test_a_server_that_leaves_politely_costs_no_token_and_no_error(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids, tokens = prompt(12, seed=5), 200
    leaving: list[Replica] = []
    async with joined(servers, model) as swarm:

        def before(asked: int, conversation: Conversation) -> None:
            if asked == 10:
                leaving.append(in_use(servers, conversation, 0))
                drain(leaving[0])

        watched = await generate(swarm, ids, tokens, before)
        assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
    assert await trio.to_thread.run_sync(leaving[0].node.process.wait, 60) == 0


async def test_without_the_bootstrap_node_generations_go_on_and_clients_join_through_any_server(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids, tokens = prompt(12, seed=6), 64
    conversation: list[Conversation] = []
    async with joined(servers, model) as swarm:

        def before(asked: int, used: Conversation) -> None:
            if asked == 10:
                conversation.append(used)
                servers.bootstrap.kill()

        watched = await generate(swarm, ids, tokens, before)
        assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
        assert not [event for event in trace_events(conversation[0]) if event.kind == "fault"]
        assert not getattr(conversation[0], "replays", 0)
    server = next(replica for replica in servers.replicas if replica.online)
    async with joined(servers, model, peers=(server.node.address,)) as swarm:
        watched = await generate(swarm, ids, tokens, lambda asked, conversation: None)
        assert watched.tokens == expected(ids, tokens)


async def test_while_nobody_serves_a_block_one_client_hears_which_in_time_and_another_waits_and_goes_on(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids, tokens, give_up_seconds = prompt(12, seed=8), 40, 12.0
    lost = [replica for replica in servers.replicas if replica.span == SPANS[1]]
    found: dict[str, Watched] = {}
    waiting = [trio.Event(), trio.Event()]
    gone = trio.Event()

    async def client(swarm: Swarm, name: str, number: int) -> None:
        conversation = swarm.conversation(len(ids) + tokens)

        async def before(asked: int) -> None:
            if asked == 10:
                waiting[number].set()
                await gone.wait()

        found[name] = await watch(swarm, conversation, ids, tokens, before)
        conversation.close()

    hasty_settings = {"give_up_seconds": give_up_seconds, "wait_seconds": give_up_seconds}
    async with (
        joined(servers, model, **hasty_settings) as hasty,
        joined(servers, model, give_up_seconds=120, wait_seconds=120) as patient,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client, hasty, "hasty", 0)
            nursery.start_soon(client, patient, "patient", 1)
            for event in waiting:
                await event.wait()
            records = {replica.peer: patient.view().get(replica.peer) for replica in lost if replica.peer}
            for replica in lost:
                kill(replica)
            gone.set()
            began = time.monotonic()
            while "hasty" not in found:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert time.monotonic() - began < give_up_seconds + LATE_SECONDS

            busy, began = psutil.Process().cpu_times(), time.monotonic()
            await trio.sleep(3)
            now = psutil.Process().cpu_times()
            assert now.user + now.system - busy.user - busy.system < 0.5 * (time.monotonic() - began)
            assert "patient" not in found

            await trio.to_thread.run_sync(servers.start, lost[0])
        assert (found["patient"].error, found["patient"].tokens) == (None, expected(ids, tokens))
        # It came back as the same peer, and its new record counts.
        assert lost[0].peer is not None
        old, new = records[lost[0].peer], patient.view().get(lost[0].peer)
        assert old is not None
        assert new is not None
        assert new.seq > old.seq
    # The step of one more token may have been sent before the servers were killed.
    assert found["hasty"].tokens in (expected(ids, tokens)[:10], expected(ids, tokens)[:11])
    assert str(found["hasty"].error).startswith("NoChain: blocks 3:6 of 6 are served by nobody")


async def test_servers_of_a_span_killed_in_turn_again_and_again_cost_no_token(
    servers: ReplicatedSwarm, model: Path, expected: Expected
) -> None:
    ids = prompt(12, seed=9)
    words = ["--model", str(model), "--tokens", "120", "--kill-every", "25", "--servers", "2", "--hop", "1"]
    row = await killed_again_and_again(parse(words), servers, 0, ids, expected(ids, 120))
    assert (row["kills"], row["error"], row["tokens_lost"], row["tokens_equal"]) == (4, None, 0, True)
    assert row["servers_killed"] >= 2


def layers_of(model: Path, start: int, stop: int, hidden: Tensor) -> Tensor:
    """What the library's layers [start, stop) make of hidden states, before the norm."""
    whole = AutoModelForCausalLM.from_pretrained(model).model
    whole.layers, whole.norm = whole.layers[start:stop], torch.nn.Identity()
    with torch.no_grad():
        found: Tensor = whole(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return found


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("start", "stop"), [(4, 5), (2, 5)])
async def test_sessions_over_some_blocks_give_what_the_library_s_layers_give_also_after_a_death(
    servers: ReplicatedSwarm, model: Path, start: int, stop: int
) -> None:
    hidden = torch.randn(2, LONG, 64, generator=torch.Generator().manual_seed(start))
    expected = layers_of(model, start, stop, hidden)
    async with (
        joined(servers, model) as swarm,
        swarm.session(batch=2, max_length=LONG, start=start, stop=stop) as session,
    ):
        spans = [hop.blocks for hop in session.chain.hops]
        assert spans == [each for each in (Blocks(start, stop).overlap(span) for span in SPANS) if each]
        found = [await session.prefill(hidden[:, :500]), await session.step(hidden[:, 500:501])]
        assert relative_error(torch.cat(cast(Any, found), dim=1), expected[:, :501]) < 1e-5
        kill(servers.of(session.chain.hops[-1].peer))
        assert relative_error(await session.prefill(hidden[:, 501:]), expected[:, 501:]) < 1e-5
        other = layers_of(model, start, stop, torch.cat([hidden[:, :2], hidden[:, 9:10]], dim=1))
        assert relative_error(await session.step(hidden[:, 9:10], position=2), other[:, 2:]) < 1e-5
        assert session.length == 3


async def test_a_server_says_to_the_token_how_much_cache_is_free_before_within_and_after_a_session(
    servers: ReplicatedSwarm, model: Path
) -> None:
    hidden = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(0))
    async with joined(servers, model) as swarm:
        async with swarm.session(max_length=256, start=3, stop=6) as session:
            (hop,) = session.chain.hops
            before = await swarm.peer_info(hop.peer)
            record = swarm.view().get(hop.peer)
            assert record is not None
            assert (before.start, before.stop, before.dtype, before.version, before.sessions) == (
                3, 6, "float32", record.version, 1,
            )  # fmt: skip
            assert before.cache_tokens == before.cache_size == 8192, "a session takes pages as it grows"
            await session.prefill(hidden)
            inside = await swarm.peer_info(hop.peer)
            pages = -(-200 // inside.page_tokens)
            assert inside.cache_tokens == before.cache_tokens - pages * inside.page_tokens
            await session.step(hidden[:, :1], position=0)
            assert (await swarm.peer_info(hop.peer)).cache_tokens == 8192 - inside.page_tokens
        with trio.fail_after(GENEROUS_SECONDS):
            while (after := await swarm.peer_info(hop.peer)).sessions:  # noqa: ASYNC110  its stream just ended
                await trio.sleep(0.01)
        assert after.cache_tokens == 8192
        with pytest.raises(PeerGone, match="'nobody' is not in our view of the swarm"):
            await swarm.peer_info("nobody")


async def test_a_fine_tuning_whose_servers_die_between_forward_and_backward_loses_nothing(
    servers: ReplicatedSwarm, model: Path, tmp_path: Path
) -> None:
    whole = load_span(open_folder(model, memo=HashMemo(tmp_path / "hashes.json")), 0, BLOCKS)
    hidden = torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(0))

    async def local_forward(batch: Tensor) -> Tensor:
        return forward(whole, batch, 0, BLOCKS)

    async def local_backward(batch: Tensor, grad: Tensor) -> Tensor:
        return backward(whole, batch, grad, 0, BLOCKS)

    undisturbed = await train(hidden, local_forward, local_backward, lambda step: None)

    def between(step: int) -> None:
        if step in (1, 2):  # all but one server of that span are gone
            for replica in [each for each in servers.replicas if each.span == SPANS[step - 1]][1:]:
                kill(replica)

    async with joined(servers, model) as swarm:
        found = await train(hidden, swarm.forward, swarm.backward, between)
    assert found == pytest.approx(undisturbed, rel=TOLERANCE)


async def train(hidden: Tensor, forward: Any, backward: Any, between: Callable[[int], None]) -> list[float]:
    """The losses of some steps that learn what to put before every row; `between` the two passes."""
    before = torch.zeros(1, 4, hidden.shape[2])
    losses = []
    for step in range(4):
        batch = torch.cat([before.expand(hidden.shape[0], -1, -1), hidden], dim=1)
        output = (await forward(batch)).clone().requires_grad_()
        loss = output.square().mean()
        loss.backward()
        losses.append(loss.item())
        between(step)
        grad = await backward(batch, output.grad)
        before = before - grad[:, : before.shape[1]].sum(0, keepdim=True)
    return losses


async def test_bits_flipped_below_the_encryption_cost_connections_and_no_token(
    model: Path, expected: Expected
) -> None:
    ids, tokens = prompt(12, seed=10), 300
    conversation: list[Conversation] = []
    with closing(Worker("tests.fault_link", [], {})) as proxy:

        def proxied(port: int) -> int:
            return int(proxy.ask({"do": "open", "target": ["127.0.0.1", port]})["port"])

        def carried() -> list[int]:
            return [link[way] for link in proxy.ask({"do": "count"}) for way in WAYS]

        async def heal_after(flips: int) -> None:
            """While bits flip no journal passes as a whole: the session may be stuck until they end."""
            at_first = carried()
            proxy.ask({"do": "flip", "every_bytes": FLIP_EVERY})
            flipped = 0
            while flipped < flips or not any(conversation[0].trace.of("fault")):
                await trio.sleep(0.05)
                pairs = zip(at_first, carried(), strict=True)
                flipped = sum(now // FLIP_EVERY - was // FLIP_EVERY for was, now in pairs)
            proxy.ask({"do": "heal"})

        with replicated_swarm(
            SPANS, ENOUGH, model=str(model), flags=FLAGS, proxied=proxied, spawn=Forked
        ) as servers:
            async with joined(servers, model) as swarm, trio.open_nursery() as nursery:
                nursery.cancel_scope.deadline = trio.current_time() + GENEROUS_SECONDS

                def before(asked: int, used: Conversation) -> None:
                    if asked == 10:
                        conversation.append(used)
                        nursery.start_soon(heal_after, FLIPS)

                watched = await generate(swarm, ids, tokens, before)
                assert (watched.error, watched.tokens) == (None, expected(ids, tokens))
            assert not nursery.cancel_scope.cancelled_caught


def test_a_link_that_goes_down_without_a_reset_costs_no_token(model: Path) -> None:
    if (reason := cannot(homes=False, lines=False)) is not None:
        pytest.skip(f"no network namespaces: {reason}")
    words = ["--mode", "halfopen", "--kill-at", "middle", "--servers", "2", "--model", str(model)]
    command = command_inside("tests.in_namespaces", words)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["error"], row["tokens_equal"]) == (None, True)
    assert row["sockets_gone_s"] is not None


def test_of_clients_killed_in_prefill_and_in_decoding_nothing_is_left(model: Path) -> None:
    words = ["--mode", "clients", "--runs", "6", "--at-once", "3", "--servers", "2", "--model", str(model)]
    found = measure(parse(words), Forked)
    assert sum(found["killed_in"].values()) == 6
    assert found["alive"]
    assert found["sessions_left"] == [0, 0]
    assert found["cache_tokens_left"] == [0, 0]
    assert found["descriptors_left"] == [0, 0]


@pytest.mark.real_model
def test_a_server_of_the_real_model_killed_in_the_midst_of_a_token_costs_no_token() -> None:
    words = ["--kill-at", "middle", "--tokens", "24", "--servers", "2"]
    found = measure(parse(words), Forked, reference)
    assert (found["runs"], found["tokens_equal"]) == (1, True)
