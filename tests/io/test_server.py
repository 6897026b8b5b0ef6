"""A node that exchanges its span for another: what its peers see meanwhile, and when loading fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import trio
import trio.lowlevel
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from node.config import VERSION, ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.info import ModelInfo
from node.monitor.metrics.exposition import exposition
from node.monitor.metrics.meters import BatchMeters
from node.monitor.metrics.node import NodeMetrics
from node.network.host import Host
from node.network.streams import Traffic
from node.runtime.faults import Faults
from node.serving.cache_budget import CacheBudget
from node.serving.executor.engine import Engine
from node.serving.executor.rates import Rates
from node.serving.forward_backward import ForwardBackwardListener
from node.serving.memory import Precision
from node.serving.mover import MoveFailed
from node.serving.placement.placement import Placement
from node.serving.served_span import ServedSpan, ServingSetup
from node.serving.server import Server
from node.serving.sessions.listener import Listener
from node.serving.span_admission import SpanAdmission
from node.serving.training.tapes import KeptTape, TapeBudget
from routing.blocks import Blocks
from routing.names import ModelId, PeerId, Revision
from routing.view.description import describe
from routing.view.records import Record
from routing.view.view import SwarmView
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import MessageError, SlowPeer
from tensor_codec.limits import Limits
from tensor_codec.messages.adapter import ADAPTER_PROTOCOL, Drop, decode_held, encode_drop
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import Run
from tensor_codec.messages.info import INFO_PROTOCOL, PeerInfo, decode_info, encode_describe
from tensor_codec.messages.session import (
    SESSION_PROTOCOL,
    Open,
    Opened,
    Result,
    Step,
    decode_from_hop,
    decode_open_reply,
    encode_open,
    encode_step,
)
from tensor_codec.span_spec import SpanSpec
from tests.fakes_serving import (
    CLIENT,
    HIDDEN,
    FakeArena,
    FakeCompute,
    FakeSpan,
    FakeStream,
    some_hidden,
    stream_pair,
    whole_model,
)

LIMITS = Limits()
ME = PeerId("me")
SPEC = SpanSpec("m", "r", Blocks(0, 3), "float32")
OPEN = Open(bytes(16), SPEC, 1, 64, "fp32")
INFO = ModelInfo(ModelId("m"), Revision("r"), "fake", 6, HIDDEN, 26, 4096, (1,) * 6, 1, 1)


async def nowhere(peer: PeerId) -> FakeStream:
    raise AssertionError


@dataclass
class FakeMemory:
    """room: for so many blocks besides what is loaded; rooms: at the next times that it is asked for."""

    room: int = 6
    rooms: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FakeSetup(ServingSetup):
    memory: FakeMemory = field(default_factory=FakeMemory)
    fetched: list[Blocks] = field(default_factory=list)

    def fetch(self, blocks: Blocks) -> None:
        self.fetched.append(blocks)

    def check_room(self, count: int) -> None:
        memory = self.memory
        if count > (memory.rooms.pop(0) if memory.rooms else memory.room):
            raise ConfigError("no room")


def setup_with(memory: FakeMemory) -> FakeSetup:
    return FakeSetup(
        folder=cast(ModelFolder, None),  # nothing is read
        info=INFO, name="name", placement=Placement(("cpu",)), precision=Precision("float32"),
        cache_tokens=10**6, journal_tokens=None, limits=LIMITS, open_push=nowhere, faults=Faults(),
        memory=memory,
    )  # fmt: skip


@dataclass
class FakeDirectory:
    """said: everything that was announced, as (state, start, stop), and where it is going from there."""

    peer_id: PeerId = ME
    said: list[tuple[str | int, ...]] = field(default_factory=list)

    def view(self) -> SwarmView:
        return SwarmView("")

    async def announce(self, record: Record) -> None:
        await trio.lowlevel.checkpoint()
        going = (record.next_start, record.next_stop) if record.moves else ()
        self.said.append((record.state, record.start, record.stop, *going))


@dataclass
class Loader:
    """Makes served spans over fakes, and blocks; `broken` spans and blocks cannot be loaded.

    seconds: that a span takes, and a block.
    """

    broken: set[tuple[int, int]] = field(default_factory=set)
    loaded: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 5.0

    async def blocks(self, setup: object, blocks: Blocks, compute: object) -> list[FakeSpan]:
        fresh = []
        for block in range(*blocks):
            await trio.sleep(self.seconds)
            if (block, block + 1) in self.broken:
                raise RuntimeError("not enough memory")
            self.loaded.append((block, block + 1))
            fresh.append(FakeSpan(block, block + 1))
        return fresh

    async def __call__(
        self, setup: ServingSetup, blocks: Blocks, compute: object, *, in_pieces: bool = False
    ) -> ServedSpan:
        await trio.sleep(self.seconds)
        if blocks in self.broken:
            raise RuntimeError("not enough memory")
        self.loaded.append(blocks)
        span = FakeSpan(*blocks)
        engine = Engine(span, FakeCompute(), Rates(1.0, 1.0), LIMITS, meters=setup.meters)
        admission = SpanAdmission(setup.spec(blocks))
        listener = Listener(admission, engine, FakeArena(), CacheBudget(10**6), nowhere, LIMITS)
        stateless = ForwardBackwardListener(admission, engine, LIMITS, Faults())
        return ServedSpan(setup, admission, listener, stateless)


@dataclass
class Setting:
    server: Server
    memory: FakeMemory
    directory: FakeDirectory
    loader: Loader
    online: list[tuple[int, int]]
    nursery: trio.Nursery
    clients: list[FakeStream] = field(default_factory=list)  # kept, as a client keeps its own

    async def open(self, start: int, stop: int, number: int = 0) -> tuple[FakeStream, Opened | Failed]:
        """Open a session as a client does."""
        ours, theirs = stream_pair(CLIENT, PeerId("me"), SESSION_PROTOCOL, LIMITS)
        self.clients.append(ours)
        self.nursery.start_soon(self._handle, theirs)
        opened = replace(OPEN, session=bytes([number]) * 16, spec=replace(SPEC, blocks=Blocks(start, stop)))
        await ours.send(encode_open(opened))
        frame = await ours.receive(5)
        assert frame is not None
        return ours, decode_open_reply(frame)

    async def _handle(self, stream: FakeStream) -> None:
        await self.server.dispatch.serve_session(stream)
        await stream.aclose()


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in a thread takes no time of the simulated clock, however busy the machine is."""

    async def at_once(do: Callable[..., object], *args: object, **_: object) -> object:
        await trio.lowlevel.checkpoint()
        return do(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)


@asynccontextmanager
async def serving(room: int = 6) -> AsyncIterator[Setting]:
    async with trio.open_nursery() as nursery:
        directory, loader, memory = FakeDirectory(), Loader(), FakeMemory(room)
        online: list[tuple[int, int]] = []
        server = Server(
            setup_with(memory), directory, FakeCompute(), nursery,
            lambda spec: online.append(spec.blocks), loader, loader.blocks,
        )  # fmt: skip
        await server.begin(Blocks(0, 3))
        yield Setting(server, memory, directory, loader, online, nursery)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("room", [3, 0])
async def test_after_a_move_the_new_blocks_are_served_and_the_old_are_not(
    room: int, autojump_clock: object
) -> None:
    async with serving(room) as setting:
        assert isinstance((await setting.open(0, 3))[1], Opened)
        await setting.server.announce_move(Blocks(3, 6))
        assert isinstance((await setting.open(0, 3, 1))[1], Opened), "as long as it only says so"
        await setting.server.move(Blocks(3, 6))
        assert setting.online == [(0, 3), (3, 6)]
        last = [("online", 3, 6)] if room else [("joining", 3, 6), ("online", 3, 6)]
        assert setting.directory.said == [
            ("joining", 0, 3), ("online", 0, 3), ("online", 0, 3, 3, 6), *last,
        ]  # fmt: skip
        assert isinstance((await setting.open(3, 6, 2))[1], Opened)
        refused = (await setting.open(0, 3, 3))[1]
        assert isinstance(refused, Failed)
        assert refused.code == "wrong_revision"
        assert (setting.server.moves, setting.server.moves_failed) == (1, 0)
        assert setting.server.setup.meters.sessions_refused == {"WrongRevision": 1}


async def test_clients_are_told_before_their_sessions_end_and_new_ones_to_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving(room=0) as setting:
        stream, _ = await setting.open(0, 3)
        setting.nursery.start_soon(setting.server.move, Blocks(3, 6))
        frame = await stream.receive(1)
        assert frame is not None
        told = decode_from_hop(frame, Contract(bytes(16), 0, 3, 1, 64, HIDDEN, "fp32", 2048))
        assert isinstance(told, Failed)
        assert told.code == "leaving"
        await trio.sleep(LIMITS.drain_idle_seconds + 1)  # nothing came, so the session has ended
        answer = (await setting.open(3, 6, 1))[1]
        assert isinstance(answer, Failed)
        assert (answer.code, answer.retry_after_seconds) == ("draining", 2.0)
        await trio.sleep(10)
        assert isinstance((await setting.open(3, 6, 2))[1], Opened)


async def test_a_node_that_takes_no_adapters_says_so_and_not_to_come_back(autojump_clock: object) -> None:
    async with serving() as setting:
        served = setting.server.dispatch.served_span
        assert served is not None
        assert served.record("online").lora == 0
        ours, theirs = stream_pair(CLIENT, PeerId("me"), ADAPTER_PROTOCOL, LIMITS)
        setting.nursery.start_soon(setting.server.dispatch.serve_adapter, theirs)
        await ours.send(encode_drop(Drop("a" * 64)))
        refused = decode_held(await ours.receive(5) or b"")
        assert isinstance(refused, Failed)
        assert (refused.code, refused.retry_after_seconds) == ("wrong_revision", None)
        assert "takes no adapters" in refused.message


async def test_a_node_short_of_memory_admits_nothing_and_serves_on(autojump_clock: object) -> None:
    async with serving() as setting:
        dispatch = setting.server.dispatch
        first, _ = await setting.open(0, 3)
        dispatch.admitting = False
        refused = (await setting.open(0, 3, 1))[1]
        assert isinstance(refused, Failed)
        assert (refused.code, refused.retry_after_seconds) == ("too_many", 5.0)
        assert setting.server.setup.meters.sessions_refused == {"TooManyStreams": 1}
        await first.send(
            encode_step(Step(bytes(16), 0, 0, "all", bytes(encode_hidden(some_hidden(1), "fp32"))))
        )
        assert await first.receive(1) is not None
        dispatch.admitting = True
        assert isinstance((await setting.open(0, 3, 1))[1], Opened)


async def test_at_the_bound_of_memory_the_youngest_session_ends_and_its_client_hears_when_to_come_back(
    autojump_clock: object,
) -> None:
    async with serving() as setting:
        streams = [(await setting.open(0, 3, number))[0] for number in range(3)]
        dispatch = setting.server.dispatch
        for stream, left in ((streams[2], 2), (streams[1], 1)):
            assert dispatch.end_youngest()
            frame = await stream.receive(1)
            assert frame is not None
            told = decode_from_hop(frame, Contract(bytes(16), 0, 3, 1, 64, HIDDEN, "fp32", 2048))
            assert isinstance(told, Failed)
            assert (told.code, told.retry_after_seconds) == ("too_many", 5.0)
            await trio.lowlevel.checkpoint()
            assert setting.server.session_count == left
        assert dispatch.end_youngest()
        assert not dispatch.end_youngest(), "one that is ending does not count"


async def test_memory_without_a_session_goes_back_to_the_system(autojump_clock: object) -> None:
    async with serving() as setting:
        await setting.server.dispatch.give_back_memory()
        pool = setting.server._current().listener.pool
        assert isinstance(pool, FakeArena)
        assert pool.given_back == 1


def keep_a_tape(setting: Setting, start: int, stop: int) -> TapeBudget:
    """Let the served span keep a tape of these blocks."""
    tapes = setting.server._current().stateless.tapes
    tapes.budget = TapeBudget(100, 30.0)
    run = Run(replace(SPEC, blocks=Blocks(start, stop)), 1, "fp32", tape=bytes(16))
    kept = KeptTape("a", run, Contract(b"", start, stop, 1, 8, HIDDEN, "fp32", 64), 10, "", 0)
    assert tapes.budget.open(kept)
    tapes.budget.keep(kept)
    return tapes.budget


async def test_tapes_go_where_memory_is_short(autojump_clock: object) -> None:
    async with serving() as setting:
        budget = keep_a_tape(setting, 0, 3)
        await setting.server.dispatch.give_back_memory()
        assert len(budget) == 0


async def test_tapes_of_blocks_that_a_node_leaves_go_with_them(autojump_clock: object) -> None:
    for blocks, left in ((Blocks(0, 2), 0), (Blocks(0, 4), 1)):
        async with serving() as setting:
            budget = keep_a_tape(setting, 0, 3)
            await setting.server.move(blocks)
            assert len(budget) == left


async def ask(setting: Setting, frame: Any = None) -> PeerInfo | Failed:
    """The answer of the node to the question for its state."""
    ours, theirs = stream_pair(CLIENT, PeerId("me"), INFO_PROTOCOL, LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setting.server.dispatch.serve_info, theirs)
        await ours.send(encode_describe() if frame is None else frame)
        answer = await ours.receive(5)
    assert answer is not None
    return decode_info(answer)


async def test_a_node_says_its_state_of_this_moment_on_request(autojump_clock: object) -> None:
    async with serving() as setting:
        budget = setting.server._current().listener.budget
        before = await ask(setting)
        assert before == PeerInfo(
            state="online", model="m", revision="r", blocks=6, start=0, stop=3, dtype="float32",
            quantize="none", sessions=0, cache_tokens=10**6, cache_size=10**6, page_tokens=16,
            session_tokens=10**6, step_tokens=2048, queue=0.0, seconds_per_block=1.0,
            prefill_seconds_per_token=1.0, name="name", version=VERSION, threads=torch.get_num_threads(),
        )  # fmt: skip
        await setting.open(0, 3)
        session = next(iter(budget._sessions))
        budget.grow(session, 40)
        inside = await ask(setting)
        assert inside == replace(before, sessions=1, cache_tokens=10**6 - 48)
        setting.server._current().admission.drain()
        assert await ask(setting) == replace(inside, state="draining")
        setting.server.dispatch.served_span = None
        refused = await ask(setting)
        assert isinstance(refused, Failed)
        assert (refused.code, refused.retry_after_seconds) == ("draining", 2.0)


async def test_a_question_for_the_state_that_is_none_is_a_fault_and_one_that_never_comes_too(
    autojump_clock: object,
) -> None:
    async with serving() as setting:
        for wrong in (b"x", [*encode_describe(), b"body"], encode_open(OPEN)):
            ours, theirs = stream_pair(CLIENT, PeerId("me"), INFO_PROTOCOL, LIMITS)
            await ours.send(wrong)
            with pytest.raises(MessageError):
                await setting.server.dispatch.serve_info(theirs)
        ours, theirs = stream_pair(CLIENT, PeerId("me"), INFO_PROTOCOL, LIMITS)
        began = trio.current_time()
        with pytest.raises(SlowPeer):
            await setting.server.dispatch.serve_info(theirs)
        assert trio.current_time() - began == pytest.approx(LIMITS.frame_start_seconds)
        ours, theirs = stream_pair(CLIENT, PeerId("me"), INFO_PROTOCOL, LIMITS)
        await ours.aclose()
        await setting.server.dispatch.serve_info(theirs)


@pytest.mark.parametrize("room", [3, 0])
async def test_when_the_new_blocks_cannot_be_loaded_the_old_ones_are_served_again(
    room: int, autojump_clock: object
) -> None:
    async with serving(room) as setting:
        await setting.open(0, 3)
        setting.loader.broken.add((3, 6))
        await setting.server.announce_move(Blocks(3, 6))
        with pytest.raises(MoveFailed, match="not enough memory"):
            await setting.server.move(Blocks(3, 6))
        assert setting.directory.said[-1] == ("online", 0, 3)
        assert (setting.server.moves, setting.server.moves_failed) == (0, 1)
        assert isinstance((await setting.open(0, 3, 1))[1], Opened)
        assert setting.loader.loaded == [(0, 3)] * (1 if room else 2)


async def test_when_the_files_of_the_new_blocks_cannot_be_fetched_nothing_changes(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(setup: object, blocks: Blocks) -> None:
        raise ConfigError("the disk is full")

    monkeypatch.setattr(FakeSetup, "fetch", full)
    async with serving() as setting:
        await setting.open(0, 3)
        await setting.server.announce_move(Blocks(3, 6))
        with pytest.raises(MoveFailed, match="the disk is full"):
            await setting.server.move(Blocks(3, 6))
        assert setting.directory.said[-1] == ("online", 0, 3)
        assert setting.server.session_count == 1
        assert isinstance((await setting.open(0, 3, 1))[1], Opened)


async def test_when_neither_can_be_loaded_the_error_says_so(autojump_clock: object) -> None:
    async with serving(room=0) as setting:
        setting.loader.broken |= {(3, 6), (0, 3)}
        with pytest.raises(ConfigError, match=r"blocks 0:3 were left .* neither could be loaded"):
            await setting.server.move(Blocks(3, 6))


@pytest.mark.parametrize("seconds", [0.5, 4.0, 6.0])
@pytest.mark.parametrize("room", [3, 0])
@pytest.mark.parametrize("window", [(3, 6), (1, 4)])
async def test_a_node_can_leave_in_the_midst_of_a_move(
    window: tuple[int, int], room: int, seconds: float, autojump_clock: object
) -> None:
    async with serving(room) as setting:
        await setting.open(0, 3)
        with trio.move_on_after(seconds):
            await setting.server.move(Blocks(*window))
        began = trio.current_time()
        await setting.server.leave()
        assert trio.current_time() - began < 2 * LIMITS.drain_seconds + 1
        assert setting.server.session_count == 0


@dataclass
class Watch:
    """Looks twice a second at what is served, and at what was said of it last.

    answered: steps of a session of the block that stays.
    """

    setting: Setting
    served: list[tuple[int, int]] = field(default_factory=list)
    said: list[tuple[str | int, ...]] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            served_span = self.setting.server.dispatch.served_span
            assert served_span is not None
            blocks, span = served_span.spec.blocks, served_span.listener.engine.span
            assert not served_span.admission.draining
            assert Blocks(span.start, span.stop).contains(blocks)
            assert served_span.listener.admission is served_span.stateless.admission
            _note(self.served, blocks)
            _note(self.said, self.setting.directory.said[-1])
            await trio.sleep(0.5)


async def received(stream: FakeStream) -> bytearray:
    frame = await stream.receive(5)
    assert frame is not None
    return frame


def _note(seen: list[Any], now: Any) -> None:
    if seen[-1:] != [now]:
        seen.append(now)


@asynccontextmanager
async def watched(room: int) -> AsyncIterator[tuple[Setting, Watch]]:
    async with serving(room) as setting:
        watch = Watch(setting)
        setting.nursery.start_soon(watch.run)
        await trio.sleep(0.1)
        yield setting, watch


@pytest.mark.parametrize(
    ("room", "steps"),
    [
        (1, [("online", 0, 3), ("online", 0, 3, 1, 4), ("online", 1, 4)]),
        (0, [("online", 0, 3), ("online", 0, 3, 1, 4), ("online", 1, 3, 1, 4), ("online", 1, 4)]),
    ],
)
async def test_at_no_moment_of_a_move_are_the_blocks_of_both_spans_unserved(
    room: int, steps: list[tuple[str | int, ...]], autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(room) as (setting, watch):
        await setting.server.announce_move(Blocks(1, 4))
        await trio.sleep(1)
        if not room:  # nothing fits beside three blocks, one beside two
            setting.memory.rooms = [0, 1]
        await setting.server.move(Blocks(1, 4))
        await trio.sleep(0.6)
        assert watch.said == steps
        assert watch.served == [step[1:3] for step in steps if step != steps[1]]
        assert setting.loader.loaded == [(0, 3), (3, 4)]
        assert setting.online == [(0, 3), (1, 4)]
        span = setting.server.dispatch.served_span.listener.engine.span
        assert (span.start, span.stop) == (1, 4)
        assert cast(FakeArena, setting.server.dispatch.served_span.listener.pool).held == (1, 4)


@pytest.mark.parametrize("rooms", [[1], [0, 1]])
async def test_a_session_of_blocks_that_stay_goes_on_while_the_others_are_loaded(
    rooms: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(6) as (setting, _):
        setting.memory.rooms = rooms
        setting.loader.seconds = 5.0
        stays, opened = await setting.open(1, 3)
        goes, _ = await setting.open(0, 3, 1)
        assert isinstance(opened, Opened)
        setting.nursery.start_soon(setting.server.move, Blocks(1, 4))
        contract = Contract(bytes(16), 1, 3, 1, 64, HIDDEN, "fp32", 2048)
        hidden = some_hidden(20)
        expected = whole_model(hidden, 1, 3)
        for position in range(20):
            body = bytes(encode_hidden(hidden[:, position : position + 1], "fp32"))
            await stays.send(encode_step(Step(bytes(16), position, position, "last", body)))
            got = decode_from_hop(await received(stays), contract)
            assert isinstance(got, Result)
            assert torch.equal(decode_hidden(got.body, contract), expected[:, position : position + 1])
            await trio.sleep(1)
        assert setting.online[-1] == (1, 4), "the move has been made meanwhile"
        told = decode_from_hop(await received(goes), replace(contract, session=bytes([1] * 16), start=0))
        assert isinstance(told, Failed)
        assert told.code == "leaving"


async def test_new_sessions_of_the_overlap_are_taken_while_the_others_are_loaded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched(6) as (setting, _):
        setting.memory.rooms = [0, 1]
        setting.nursery.start_soon(setting.server.move, Blocks(1, 4))
        await trio.sleep(1)
        assert isinstance((await setting.open(1, 3, 1))[1], Opened)
        assert isinstance((await setting.open(0, 3, 2))[1], Failed)
        assert isinstance((await setting.open(3, 4, 3))[1], Failed), "not there yet"
        await trio.sleep(8)  # a session ends whose first step does not come within 10 s
        assert isinstance((await setting.open(3, 4, 4))[1], Opened)
        assert setting.server.session_count == 2


@pytest.mark.parametrize("rooms", [[1], [0, 1]])
async def test_when_what_is_missing_cannot_be_loaded_what_was_left_is_loaded_again(
    rooms: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    async with watched(6) as (setting, watch):
        setting.memory.rooms = list(rooms)
        setting.loader.broken.add((3, 4))
        await setting.server.announce_move(Blocks(1, 4))
        with pytest.raises(MoveFailed, match="not enough memory"):
            await setting.server.move(Blocks(1, 4))
        assert setting.directory.said[-1] == ("online", 0, 3)
        assert setting.loader.loaded == [(0, 3), (0, 1)][: len(rooms)]
        assert isinstance((await setting.open(0, 3, 1))[1], Opened)
        await trio.sleep(0.6)
        assert watch.served == ([(0, 3)] if len(rooms) == 1 else [(0, 3), (1, 3), (0, 3)])


async def test_what_stays_is_served_even_if_nothing_can_be_loaded_any_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched(6) as (setting, _):
        setting.memory.rooms = [0, 1]
        setting.loader.broken |= {(3, 4), (0, 1)}
        with pytest.raises(MoveFailed, match="not enough memory; serving blocks 1:3"):
            await setting.server.move(Blocks(1, 4))
        assert (setting.directory.said[-1], setting.online[-1]) == (("online", 1, 3), (1, 3))
        assert isinstance((await setting.open(1, 3, 1))[1], Opened)
        setting.loader.broken.clear()
        await setting.server.move(Blocks(2, 5))
        assert setting.directory.said[-1] == ("online", 2, 5)


async def test_where_the_rest_does_not_fit_beside_the_overlap_it_is_loaded_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving(room=0) as setting:
        await setting.server.move(Blocks(1, 4))
        assert setting.directory.said[2:] == [
            ("online", 1, 3, 1, 4), ("joining", 1, 4), ("online", 1, 4),
        ]  # fmt: skip
        assert setting.loader.loaded == [(0, 3), (1, 4)]
        assert isinstance((await setting.open(1, 4))[1], Opened)


async def test_without_a_common_block_the_old_span_is_served_until_the_new_one_is_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched(3) as (setting, watch):
        await setting.open(0, 3)
        await setting.server.announce_move(Blocks(3, 6))
        setting.nursery.start_soon(setting.server.move, Blocks(3, 6))
        await trio.sleep(4)
        assert isinstance((await setting.open(0, 3, 1))[1], Opened)
        await trio.sleep(2)
        assert watch.said[-1] == ("online", 3, 6)
        assert isinstance((await setting.open(3, 6, 2))[1], Opened)
        assert setting.server.session_count == 2, "the one that is in use is served until it has moved"
        await trio.sleep(5)
        assert setting.server.session_count == 1
        assert setting.server.dispatch.leaving is None


async def test_the_window_of_a_move_may_be_on_both_sides_or_within(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched(6) as (setting, _):
        for window in ((1, 2), (0, 6), (2, 5)):
            await setting.server.move(Blocks(*window))
            assert setting.directory.said[-1] == ("online", *window)
        await trio.sleep(0.6)
        assert setting.loader.loaded[1:] == [(0, 1), (2, 3), (3, 4), (4, 5), (5, 6)]


# The metrics of a node


def metrics_of(setting: Setting | None, role: str = "serve") -> NodeMetrics:
    host = SimpleNamespace(peer_id=ME, faults=Faults(), traffic=Traffic(), connections=[1, 2])
    metrics = NodeMetrics(role, cast(Host, host), facts=lambda: describe(SwarmView(""), {}))
    if setting is not None:
        metrics.server, metrics.meters = setting.server, setting.server.setup.meters
    return metrics


def scraped(metrics: NodeMetrics) -> dict[str, float]:
    _, body = exposition(metrics.sheet(), "")
    return {
        f"{sample.name}{sample.labels or ''}": sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_a_scrape_of_a_serving_node_has_its_blocks_its_sessions_and_its_batches(
    autojump_clock: object,
) -> None:
    async with serving() as setting:
        setting.server.setup.meters.batches = BatchMeters()
        stream, _ = await setting.open(0, 3)
        for position in range(3):
            body = bytes(encode_hidden(some_hidden(1), "fp32"))
            await stream.send(encode_step(Step(bytes(16), position, position, "all", body)))
            assert await stream.receive(1) is not None
        metrics = metrics_of(setting)
        metrics.host.faults.add("a", SlowPeer("5 s"))
        metrics.host.faults.add("b", SlowPeer("5 s"))
        metrics.host.traffic.sent = 77
        found = scraped(metrics)
        assert found["raceme_node_state{'state': 'online'}"] == 1
        assert found["raceme_node_state{'state': 'joining'}"] == 0
        assert (found["raceme_node_block_start"], found["raceme_node_block_stop"]) == (0, 3)
        assert found["raceme_node_sessions"] == 1
        assert found["raceme_node_batches_total{'kind': 'decode'}"] == 3
        assert found["raceme_node_tokens_total{'kind': 'decode'}"] == 3
        assert found["raceme_node_batch_rows_bucket{'kind': 'decode', 'le': '1.0'}"] == 3
        assert found["raceme_node_step_wait_seconds_count"] == 3
        assert found["raceme_node_cache_tokens"] == 10**6
        assert found["raceme_node_cache_free_tokens"] < 10**6
        assert found["raceme_node_peer_faults_total{'error': 'SlowPeer'}"] == 2
        assert found["raceme_node_peer_faults_total{'error': 'BadResult'}"] == 0
        assert found["raceme_node_connections"] == 2
        assert found["raceme_node_sent_bytes_total"] == 77
        assert metrics.health() == {
            "status": "ok", "role": "serve", "state": "online", "peer": "me", "version": VERSION,
            "model": "m", "revision": "r", "blocks": [0, 3], "sessions": 1,
        }  # fmt: skip
        labels = {"role": "serve", "model": "m", "revision": "r", "dtype": "float32", "device": "cpu"}
        (build,) = [name for name in found if name.startswith("raceme_build_info")]
        assert all(f"'{key}': '{value}'" in build for key, value in labels.items())


async def test_a_node_without_a_span_is_joining_and_one_that_leaves_is_draining(
    autojump_clock: object,
) -> None:
    assert metrics_of(None).state == "joining"
    assert scraped(metrics_of(None))["raceme_node_state{'state': 'joining'}"] == 1
    assert metrics_of(None).health()["blocks"] is None
    async with serving() as setting:
        metrics = metrics_of(setting)
        await setting.server.leave()
        assert metrics.state == metrics.health()["state"] == "draining"


def test_a_bootstrap_node_has_connections_and_a_swarm_and_no_blocks() -> None:
    found = scraped(metrics_of(None, "bootstrap"))
    assert found["raceme_node_connections"] == 2
    assert found["raceme_swarm_servers{'state': 'online'}"] == 0
    assert not any("block" in name or "sessions" in name for name in found)
    assert "blocks" not in metrics_of(None, "bootstrap").health()


async def test_without_a_scrape_no_batch_is_counted(autojump_clock: object) -> None:
    async with serving() as setting:
        stream, _ = await setting.open(0, 3)
        body = bytes(encode_hidden(some_hidden(1), "fp32"))
        await stream.send(encode_step(Step(bytes(16), 0, 0, "all", body)))
        assert await stream.receive(1) is not None
        assert setting.server.setup.meters.batches is None
        assert not any("batch" in name for name in scraped(metrics_of(setting)))
