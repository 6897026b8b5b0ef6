"""What a node takes on near the end of its descriptors and of its memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import trio

from node.main import guard_of
from node.runtime.watermarks import Guard, Usage, Verdict, judge, read_usage
from node.serving.memory import OTHER_BYTES, Memory
from tensor_codec.limits import GIB, MIB, Limits

LIMITS = Limits()
BOUND = 10 * GIB
CALM = Usage(descriptors=100, max_descriptors=1000, resident=4 * GIB)


@pytest.mark.parametrize(
    ("usage", "verdict"),
    [
        (CALM, Verdict()),
        (replace(CALM, descriptors=799), Verdict()),
        (replace(CALM, descriptors=800), Verdict(accepts=False)),
        (replace(CALM, descriptors=10**6, max_descriptors=0), Verdict()),
        (replace(CALM, resident=9 * GIB - MIB), Verdict()),
        (replace(CALM, resident=9 * GIB), Verdict(admits=False)),
        (replace(CALM, resident=10 * GIB - MIB), Verdict(admits=False)),
        (replace(CALM, resident=10 * GIB), Verdict(admits=False, ends=True)),
        (Usage(1000, 1000, 11 * GIB), Verdict(accepts=False, admits=False, ends=True)),
    ],
)
def test_the_watermarks_are_at_eighty_ninety_and_a_hundred_percent(usage, verdict):
    assert judge(usage, BOUND, LIMITS) == verdict


def test_without_a_bound_no_memory_is_too_much():
    assert judge(replace(CALM, resident=100 * GIB), None, LIMITS) == Verdict()


def test_a_process_reads_its_own_usage():
    usage = read_usage()
    assert 3 <= usage.descriptors <= (usage.max_descriptors or 10**9)
    assert 10 * MIB < usage.resident < 100 * GIB


@dataclass
class FakeConnections:
    accepting: bool = True


@dataclass
class FakeSessions:
    """open: so many sessions.  heap: calls that gave memory back."""

    admitting: bool = True
    open: int = 3
    given_back: int = 0

    async def give_back_memory(self) -> None:
        self.given_back += 1

    def end_youngest(self) -> bool:
        self.open -= self.open > 0
        return self.open > 0


@dataclass
class Guarded:
    usage: Usage = CALM
    bound: int | None = BOUND
    connections: FakeConnections = field(default_factory=FakeConnections)
    sessions: FakeSessions = field(default_factory=FakeSessions)

    def guard(self) -> Guard:
        return Guard(LIMITS, self.connections, self.sessions, lambda: self.bound, lambda: self.usage)


async def test_connections_wait_until_descriptors_are_free_again_and_the_log_says_each_change_once(caplog):
    caplog.set_level("INFO", "raceme")
    guarded = Guarded()
    guard = guarded.guard()
    for descriptors, accepting in ((100, True), (900, False), (950, False), (700, True), (700, True)):
        guarded.usage = replace(CALM, descriptors=descriptors)
        await guard.look()
        assert guarded.connections.accepting is accepting
    assert [record.getMessage() for record in caplog.records] == [
        "900 of 1000 file descriptors are in use: no new connection is accepted (raise ulimit -n)",
        "700 of 1000 file descriptors are in use: connections are accepted again",
    ]
    assert guarded.sessions == FakeSessions()


async def test_at_the_bound_the_youngest_sessions_end_one_after_the_other_and_the_log_says_it_once(caplog):
    caplog.set_level("INFO", "raceme")
    guarded = Guarded()
    guard = guarded.guard()
    for gib, admitting, sessions in ((9.5, False, 3), (10.5, False, 2), (10.2, False, 1), (8, True, 1)):
        guarded.usage = replace(CALM, resident=int(gib * GIB))
        await guard.look()
        assert (guarded.sessions.admitting, guarded.sessions.open) == (admitting, sessions)
    assert guarded.sessions.given_back == 3
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "no new session is admitted",
        "the youngest sessions are ended until it is less",
        "sessions are admitted again; 2 were ended",
    ]


async def test_while_the_blocks_of_two_spans_are_loaded_no_bound_holds():
    guarded = Guarded(replace(CALM, resident=11 * GIB), bound=None)
    await guarded.guard().look()
    assert guarded.sessions == FakeSessions()


async def test_a_guard_looks_once_a_second(autojump_clock):
    looks: list[float] = []

    def read() -> Usage:
        looks.append(trio.current_time())
        return CALM

    guard = Guard(LIMITS, FakeConnections(), read=read)
    began = trio.current_time()
    with trio.move_on_after(3.5):
        await guard.run()
    assert [round(look - began) for look in looks] == [0, 1, 2, 3]


def test_a_loaded_span_that_took_more_than_expected_moves_the_bound_up_and_never_down():
    stated = Memory(weights=GIB, cache=GIB, workspace=GIB, process=GIB, network=GIB)
    expected = 2 * GIB + OTHER_BYTES
    assert stated.bound_after_loading(expected - GIB) == stated.resident_bound
    assert stated.bound_after_loading(expected + 5) == stated.resident_bound + 5
    on_device = replace(stated, on_device=True)
    assert on_device.bound_after_loading(expected + 5) == on_device.resident_bound + GIB + 5


def test_a_node_without_sessions_guards_its_descriptors_alone():
    class Node:
        class host:
            connections = FakeConnections()

    class Config:
        limits = LIMITS

    guard = guard_of(Config, Node)  # type: ignore[arg-type]
    assert guard.sessions is None
    assert guard.connections is Node.host.connections
    assert guard.resident_bound() is None
