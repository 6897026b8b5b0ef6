"""A node's threads next to another process that serves on the machine, and after that one is killed."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import trio

from node.main import _use_threads
from node.runtime.compute_thread import open_compute_thread
from node.serving.placement import thread_share
from node.serving.placement.placement import Placement
from node.serving.placement.thread_share import ThreadShare, follow, presence
from tests.processes import python, running

pytestmark = pytest.mark.process

NEIGHBOUR = """
import sys, time
from pathlib import Path
from node.serving.placement.thread_share import presence
with presence(Path(sys.argv[1])):
    print("there", flush=True)
    time.sleep(600)
"""
SECONDS = 60.0


@pytest.fixture
def _own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_own_threads")
async def test_torch_has_fewer_threads_next_to_a_neighbour_and_more_once_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(thread_share, "MORE_SECONDS", 0.5)
    monkeypatch.setattr(thread_share, "LOOK_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "raceme")
    command = [python()[0], "-c", NEIGHBOUR, str(tmp_path)]
    with presence(tmp_path) as own, running(command) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "there\n"
        async with open_compute_thread() as compute, trio.open_nursery() as nursery:
            share = ThreadShare(cores=2, threads=2)
            nursery.start_soon(
                follow, share, own, partial(_use_threads, compute, Placement(("cpu",))), lambda: 1
            )

            async def has(threads: int) -> None:
                with trio.fail_after(SECONDS):
                    while await compute.run(torch.get_num_threads) != threads or share.threads != threads:  # noqa: ASYNC110
                        await trio.sleep(0.05)

            await has(1)
            os.kill(neighbour.pid, signal.SIGKILL)
            await has(2)
            assert torch.get_num_threads() == 2  # here too: a step may be computed outside of that thread
            nursery.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records if "from now on" in record.getMessage()] == [
        "1 thread from now on: 2 nodes serve on this machine",
        "2 threads from now on: 1 node serves on this machine",
    ]
