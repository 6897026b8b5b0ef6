"""docs/path-of-a-token.md names what is called, in the order in which it is: a real swarm is traced."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

import client
from client.session.trace import Trace as Events
from node import main
from node.config import NetworkConfig, NodeConfig
from node.runtime.compute_thread import ComputeThread, open_compute_thread
from routing.blocks import Blocks
from routing.names import PeerId
from tensor_codec.limits import Limits
from tests.fakes_serving import CLIENT, World, continued, conversation_of, generated, swarm
from tests.traced import PACKAGES, ROOT, Called, Tracer

PAGE = ROOT / "docs" / "path-of-a-token.md"
SPANS = ((0, 2), (2, 4), (4, 6))
GENERATIONS, TOKENS = 3, 5
PROMPT_TEXT = "Once upon a time, in a village"
Window = Sequence[Called]  # what was called for one token

# What runs for every token and has no place on the page: it decides nothing about the token's way.
HELPERS = {
    "client/chains/avoided_peers.py": "remembers faults",
    "client/session/repair/lost_time.py": "adds up seconds",
    "client/session/standby/standbys.py": "says that there are none",
    "client/session/trace.py": "takes notes",
    "node/model/blocks/device/staging.py": "moves hidden states",
    "node/model/blocks/fused_block.py": "holds a block",
    "node/model/llama/modules.py": "holds weights, and the angles of positions",
    "node/serving/executor/batch_cost.py": "adds up seconds",
    "node/serving/executor/crowds.py": "counts the steps of prefixes",
    "node/network/connection_table.py": "holds the connection in use",
    "node/network/relaying/circuits.py": "says whether a connection came of a circuit",
    "node/network/admission/rates.py": "counts the streams that are opened",
    "node/network/libp2p_adapter.py": "runs the connection for py-libp2p",
    "node/network/transport/yamux_limits.py": "counts windows and pings",
    "node/network/transport/multistream.py": "agrees on a protocol once for each stream",
    "routing/view/records.py": "holds what a peer says",
    "routing/blocks.py": "compares runs of blocks",
    "routing/chains/hops.py": "holds what a chain is",
    "tensor_codec/blocks.py": "compares runs of blocks",
    "node/runtime/values.py": "checks arguments",
    "tensor_codec/memory.py": "sets memory aside",
    "tensor_codec/limits.py": "holds the limits",
    "tensor_codec/header.py": "packs and unpacks the header of every message",
    "node/main.py": "hands over to the host",
    "node/network/addresses.py": "reads addresses",
    "node/network/directory/met.py": "remembers peers",
    "node/network/directory/neighbours.py": "knows the records that are not passed on",
    "node/network/prefixes.py": "reads addresses",
    "node/network/budgets/stream_place.py": "holds the place of a large frame",
    "node/serving/sessions/step_room.py": "counts the bytes of waiting steps",
    "client/monitor/watching.py": "knows the open sessions, for programs that show them",
    "node/runtime/faults.py": "remembers faults",
    "tensor_codec/token_bucket.py": "counts what a client asks for",
}
# Public coroutines, and functions by which one package enters another, that the page may leave out.
UNNAMED = {
    "vector_bytes": "sizes of bodies",
    "Route.open": "within Route._line_up",
    "Answers.has_answered": "within Answers",
    "Answers.is_due": "within Asker.measure",
    "Answers.late": "within Directory.late",
    "Answers.rtts": "within Directory.rtts",
    "Answers.silent": "within Answers",
    "Answers.unknown": "within Directory.unknown",
    "Answers.wait_for": "within Asker.measure",
    "Blocks.contains": "within SpanSpec.admits",
    "ComputeThread.run": "within HeadBatches.pick, where the event loop's thread does not compute",
    "Connection.flush": "of the pings of Directory.measure",
    "Connection.run": "goes on when its read loop does",
    "Costs.chain": "within cheapest_chain",
    "Distances.between": "within ChainChooser.observe_step",
    "Directory.is_vouched": "within Node.open_stream",
    "Directory.late": "nobody, where all have answered",
    "Directory.rtts": "what Directory.measure has measured",
    "Directory.unknown": "nobody, where all have answered",
    "FramedStream.aclose": "ends a ping",
    "HopWorker.run": "goes on when its reader or its worker does",
    "Host.connect": "within Directory.measure",
    "Host.open_bytes": "within Host.open_stream",
    "Host.ping": "within Directory.measure",
    "_PushStream.take": "within read_pushes",
    "Inbox.take": "of the prompt's steps, which a task of the session takes",
    "Journal.cut": "nothing to cut",
    "MuxedStream.receive_some": "the protocol's name, for negotiate",
    "MuxedStream.send_all": "of the pings of Directory.measure",
    "Node.open_stream": "looks the address up for PushLink.connect",
    "Outlet.aclose": "nothing to leave yet",
    "Outlet.end_bulk": "nothing to end yet",
    "ReadBuffer.fill": "within SecureChannel.receive",
    "ChainChooser.is_covered_by": "asked by Asker.measure",
    "Route.end_bulk": "nothing to end for a single token",
    "ServedSpan.run": "goes on when Engine.run does",
    "SwarmView.dialled_at": "the addresses of that record, for a dial",
    "SwarmView.get": "a record of the view",
    "SwarmView.records": "the records of the view",
    "SwarmView.relayed_rate": "the rate of a peer's relays, for the codec",
    "TokenBucket.try_take": "within PushLinks.acquire",
    "is_local": "names the client of a dial",
    "admitted": "within ChainChooser.observe_step",
    "costs": "within cheapest_chain",
    "queue_price": "within queue_markup",
    "expire": "within Directory.view",
    "gaps": "within ChainChooser.is_covered_by",
    "sample": "within ChainChooser.choose",
    "queue_markup": "before client_bias",
    "step_epoch": "within PushedSteps.take_push",
    "step_session": "within PushedSteps.take_push",
}


# The page


def section(heading: str) -> str:
    """The text below a heading of the page, up to the next one."""
    return PAGE.read_text().split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]


HEADINGS = ("Once", "For every token", "With several sessions", "When something goes wrong")
ONCE, EVERY, SEVERAL, WRONG = map(section, HEADINGS)


@dataclass(frozen=True)
class Names:
    """What the packages' source defines.  words: every word in it."""

    functions: frozenset[str]
    properties: frozenset[str]
    words: frozenset[str]


@cache  # when a test asks, and not when tests are collected
def names() -> Names:
    functions, properties, words = set[str](), set[str](), set[str]()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        source = path.read_text()
        words |= set(re.findall(r"\w+", source))
        for name, node in functions_of(ast.parse(source)):
            functions.add(name)
            if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
                properties.add(name)
    return Names(frozenset(functions), frozenset(properties), frozenset(words))


def functions_of(
    tree: ast.AST, prefix: str = ""
) -> Iterable[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node


def named(text: str) -> list[str]:
    """The functions that a text names, each once, in its order."""
    quoted = re.findall(r"(?<!\[)`([A-Za-z_][\w.]*)`", text)
    return list(dict.fromkeys(name for name in quoted if "." in name or name in names().functions))


def linked(text: str) -> set[str]:
    return {target.removeprefix("../") for target in re.findall(r"\]\((\.\./[\w/]+\.py)\)", text)}


# The run


@dataclass(frozen=True)
class Trace:
    """What one client's generations called.

    first: for the first token of each, with the chain, the session and the prompt.  later: from the step of
    a token to the step of the next one.  several: for all tokens of two generations at once.
    """

    first: Sequence[Window] = field(repr=False)
    later: Sequence[Window] = field(repr=False)
    several: Window = field(repr=False)


async def trace_generations(model: Path, folder: Path) -> Trace:
    tracer, first, later = Tracer(), [], []
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        computes: list[ComputeThread] = []
        peers: tuple[str, ...] = ()
        for number, blocks in enumerate(SPANS):
            computes.append(await stack.enter_async_context(open_compute_thread()))
            ready = folder / f"{number}.json"
            config = NodeConfig(
                NetworkConfig(peers=peers, ready_file=ready), str(model),
                blocks=Blocks(*blocks), dtype="float32", device="cpu", threads=1, cache_tokens=1024,
            )  # fmt: skip
            stopping = main.Stopping(trio.Event(), trio.CancelScope())
            nursery.start_soon(main._serve, config, computes[-1], stopping)
            while not ready.exists():  # noqa: ASYNC110  the node tells others by this file
                await trio.sleep(0.01)
            peers = peers or (json.loads(ready.read_text())["addresses"][0],)
        swarm = await stack.enter_async_context(client.connect(str(model), peers=peers))
        swarm.local_model.make_exact_argmax()  # else it may come up in the middle
        computes.append(cast(Any, swarm)._compute)
        for compute in computes:
            await compute.run(tracer.start)
        tracer.start()
        try:
            for _ in range(4 * GENERATIONS):
                await trio.testing.wait_all_tasks_blocked(0.05)  # what the last one left is gone
                events = Events()
                begin, until_first = len(tracer.calls), 0
                async for _ in swarm.generate(PROMPT_TEXT, max_new_tokens=TOKENS, trace=events):
                    until_first = until_first or len(tracer.calls)
                # On a machine that is much too busy hops are late, and asked and replaced as in a fault.
                if not events.counts["fault"] and not events.counts["rerouted"]:
                    first.append(tracer.calls[begin:until_first])
                    later += steps_of(tracer.calls[begin:])
                if len(first) == GENERATIONS:
                    break
            assert len(first) == GENERATIONS, "this machine is too busy for a session without a fault"
            begin = len(tracer.calls)
            async with trio.open_nursery() as several:
                for text in (PROMPT_TEXT, "Another text"):
                    several.start_soon(read_all, swarm.generate(text, max_new_tokens=TOKENS))
        finally:
            tracer.stop()
            for compute in computes:
                await compute.run(tracer.stop)
        nursery.cancel_scope.cancel()
    return Trace(first, later, tracer.calls[begin:])


async def read_all(tokens: AsyncIterator[object]) -> None:
    async for _ in tokens:
        pass


def steps_of(calls: Window) -> list[Window]:
    """The calls of a generation from one token's step to the next one's, but the prompt's and the last."""
    sent = [place for place, call in enumerate(calls) if call.name == "Conversation._send_ahead"]
    return [calls[one:two] for one, two in pairwise(sent[1:])]


@pytest.fixture(scope="module")
def trace(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACEME_CACHE", str(folder / "cache"))
        patch.setattr(
            "client.session.repair.watchdog.MIN_HOP_SECONDS", 20.0
        )  # for a busy machine, under a profiler
        return trio.run(trace_generations, tiny_llama, folder)


# The comparison


def first_calls(window: Window) -> dict[str, int]:
    """When each function was first called."""
    places: dict[str, int] = {}
    for place, call in enumerate(window):
        places.setdefault(call.name, place)
    return places


# What a process does besides its tokens, by what its tasks run: records, pings of its own, moves.
BESIDE = (
    "Announcer.",
    "Asker.",
    "Directory.",
    "Discovery.",
    "LiveView.",
    "Neighbours.",
    "Server.",
    "Balancer.",
    "Guard.",
)


def in_all(windows: Sequence[Window]) -> dict[str, Called]:
    """The functions that were called each time, and not by what a process does besides its tokens."""
    windows = [[call for call in window if not call.root.startswith(BESIDE)] for window in windows]
    common = set.intersection(*({call.name for call in window} for window in windows))
    return {call.name: call for window in windows for call in window if call.name in common}


def disorder(wanted: Sequence[str], window: Window) -> list[str]:
    """Where the page's order is not that of the calls, one line for each pair."""
    places = first_calls(window)
    return [f"{two} is called before {one}" for one, two in pairwise(wanted) if places[one] > places[two]]


def not_in_turn(wanted: Sequence[str], window: Window) -> str | None:
    """The first of these that is not called after all those before it; None where each has its turn."""
    calls = iter(window)
    return next((name for name in wanted if all(call.name != name for call in calls)), None)


def package_of(module: str) -> str:
    parts = module.split("/")
    return "/".join(parts[: 2 if parts[0] == "node" and len(parts) > 2 else 1])


def matters(call: Called) -> bool:
    """Whether a reader has to know of this function.

    A public coroutine is where the token may have to wait.  A public function that another package calls
    is where it is handed over.
    """
    name = call.name.rpartition(".")[2]
    if name.startswith("_") or "<" in call.name or call.name in names().properties or call.module in HELPERS:
        return False
    crosses = call.caller is not None and package_of(call.caller[0]) != package_of(call.module)
    return call.is_coroutine or crosses


def opening(window: Window) -> Window:
    """The part of a first token's calls in which the session is opened."""
    return window[: first_calls(window)["Session.submit"]]


def test_every_function_that_the_page_names_exists():
    for name in named(PAGE.read_text()):
        assert name in names().functions, f"there is no {name}"
    for word in re.findall(r"(?<!\[)`([A-Za-z_]\w*)`", PAGE.read_text()):
        assert word in names().words, f"nothing is called {word}"


def test_every_function_on_the_path_is_called_when_the_page_says(trace: Trace):
    for text, windows in ((ONCE, trace.first), (EVERY, trace.later)):
        wanted, called = named(text), in_all(windows)
        assert len(wanted) > 30
        assert [name for name in wanted if name not in called] == [], "named, and not called"
    assert set(named(SEVERAL)) <= {call.name for call in trace.several}


def test_the_order_of_the_page_is_the_order_of_the_calls(trace: Trace):
    at_the_client = re.split(r"^4\. ", ONCE, flags=re.MULTILINE)[0]
    for text, windows in ((at_the_client, trace.first), (EVERY, trace.later)):
        # A ping or a record in the middle of a token may come first once; not each time.
        assert min((disorder(named(text), window) for window in windows), key=len) == []
    # All hops open the session at once: one of them does what the page says, in its order.
    for window in trace.first:
        assert not_in_turn(named(ONCE), window) is None


def test_every_module_on_the_path_is_linked(trace: Trace):
    for windows in ([opening(window) for window in trace.first], trace.later):
        modules = {call.module for call in in_all(windows).values()}
        assert sorted(modules - linked(ONCE + EVERY) - HELPERS.keys()) == []


def test_every_function_that_matters_on_the_path_is_named(trace: Trace):
    everything = named(ONCE + EVERY)
    for windows in ([opening(window) for window in trace.first], trace.later):
        common = in_all(windows)
        wanted = {
            call.name for window in windows for call in window if common.get(call.name) and matters(call)
        }
        assert sorted(wanted - set(everything) - UNNAMED.keys()) == []


# When something goes wrong: hops in memory that compute with small integers, and the clock of the test

PROMPT = [3, 1, 4, 1, 5]


async def nothing(world: World) -> None:
    """Nothing happens."""


async def kill(world: World) -> None:
    """A hop dies."""
    await world.kill("B")


async def freeze(world: World) -> None:
    """A hop is silent."""
    world.freeze("B")


async def fill(world: World) -> None:
    """A hop has no more room."""
    world.nodes[PeerId("B")].budget.tokens = 16  # of which the session holds a page


async def slow(world: World) -> None:
    """A hop computes for much longer than before."""
    world.nodes[PeerId("B")].compute.seconds *= 10


async def part(world: World) -> None:
    """Two hops cannot reach each other from now on, and the second one is replaced."""
    world.unreachable |= {(PeerId("A"), PeerId("B")), (PeerId("A"), PeerId("b"))}
    await world.kill("B")


async def meet(world: World) -> None:
    """A hop is reached without a relay from now on."""
    world.relayed.clear()


async def drain(world: World) -> None:
    """A hop leaves."""
    world.nursery.start_soon(world.nodes[PeerId("B")].listener.drain)
    await trio.testing.wait_all_tasks_blocked()


async def follow(world: World) -> None:
    """A hop dies that has a standby."""
    await world.kill("B")


EVENTS = {
    "A hop has a standby": follow,
    "A hop fails": freeze,
    "The repair": kill,
    "A hop says no": fill,
    "Two hops cannot reach each other": part,
    "A hop has become slow": slow,
    "A direct way comes": meet,
    "The client goes away": nothing,
    "A hop leaves": drain,
}
CASES = dict(re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- |\Z)", WRONG, re.MULTILINE | re.DOTALL))


def test_every_case_that_the_page_tells_of_is_tried():
    assert CASES.keys() == EVENTS.keys()


@pytest.mark.parametrize("case", EVENTS)
async def test_what_the_page_says_of_trouble_is_what_is_called(case: str, autojump_clock):
    tracer = Tracer()
    # A hop that waits for room for as long as it may is left before it has said no.
    async with swarm(Limits(cache_wait_seconds=0.5)) as world:
        for start, pair in ((0, "Aa"), (3, "Bb"), (6, "Cc")):
            for name in pair:
                world.add(name, start, start + 3, seconds=0.01)
        if EVENTS[case] is meet:
            world.relayed.add((CLIENT, PeerId("B")))
        conversation = conversation_of(world, standby=EVENTS[case] is follow)
        found = await continued(conversation, PROMPT, 8)
        tracer.start()
        try:
            await EVENTS[case](world)
            found += await continued(conversation, PROMPT + found, 8)
            conversation.close()
            await trio.testing.wait_all_tasks_blocked()
        finally:
            tracer.stop()
        assert found == generated(PROMPT, 16, 9)
        for node in world.nodes.values():
            node.budget.tokens = 10**6
        for name in list(world.frozen):
            world.thaw(name)
    called = {call.name for call in tracer.calls}
    assert [name for name in named(CASES[case]) if name not in called] == [], "named, and not called"


def test_nothing_is_left_out_of_the_page_that_does_not_exist():
    assert UNNAMED.keys() <= names().functions
    assert all((ROOT / module).is_file() for module in HELPERS)
