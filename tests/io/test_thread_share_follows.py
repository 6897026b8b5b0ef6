"""A running node looks at the others on its machine every second, and changes its threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trio
import trio.testing

from node.main import _use_threads
from node.model.parallel.team import Team
from node.runtime.compute_thread import open_compute_thread
from node.serving.placement.placement import Placement
from node.serving.placement.thread_share import COUNT_SECONDS, MORE_SECONDS, ThreadShare, follow, presence


async def at_once(function: Callable[[], Any]) -> Any:  # Any: of either look
    """In place of a thread, which a mock clock does not wait for."""
    return function()


async def test_threads_change_as_other_nodes_come_and_go(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
):
    changes: list[tuple[float, int, int]] = []

    async def change(threads: int, nodes: int) -> None:
        changes.append((trio.current_time() - began, threads, nodes))

    began = trio.current_time()
    with presence(tmp_path) as own:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, ThreadShare(2, 2), own, change, lambda: 1, at_once)
            await trio.sleep(3.5)
            assert changes == []
            with presence(tmp_path):
                await trio.sleep(10)
            await trio.sleep(MORE_SECONDS + 2)
            nursery.cancel_scope.cancel()
    assert [(round(at), *what) for at, *what in changes] == [(4, 1, 2), (round(14 + MORE_SECONDS), 2, 1)]


async def test_command_lines_are_counted_for_a_while_after_a_change_alone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
):
    counts = 0

    def count() -> int:
        nonlocal counts
        counts += 1
        return 2  # a node of another user

    changes: list[tuple[int, int]] = []

    async def change(threads: int, nodes: int) -> None:
        changes.append((threads, nodes))

    with presence(tmp_path) as own:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, ThreadShare(4, 4), own, change, count, at_once)
            await trio.sleep(60.5)
            assert counts == COUNT_SECONDS + 1
            with presence(tmp_path):
                await trio.sleep(60)
            assert counts == 2 * (COUNT_SECONDS + 1)
            nursery.cancel_scope.cancel()
    assert changes == [(2, 2)]


async def test_ranks_take_the_number_of_their_node(caplog: pytest.LogCaptureFixture):
    class FakeTeam:
        """Keeps the number that it was given."""

        threads = 0

        def use_threads(self, threads: int) -> None:
            self.threads = threads

    caplog.set_level(logging.INFO, "raceme")
    team = FakeTeam()
    try:
        async with open_compute_thread() as compute:
            await _use_threads(compute, Placement(("cpu", "cpu"), cast(Team, team)), 2, 2)
        assert (team.threads, torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(1)
    (record,) = caplog.records
    words = "2 threads in each of 2 processes from now on: 2 nodes serve on this machine"
    assert record.getMessage() == words
