"""Processes of tensor parallelism that die: no step waits for them, and none outlives the node."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.parallel.lost import SpanLost
from node.model.parallel.sharded import load_sharded
from node.model.parallel.team import open_team
from tests.model_fixtures import save_tiny

torch.set_num_threads(1)

GENEROUS_SECONDS = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    save_tiny("llama", tmp_path / "model")
    return open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 6.0)])
def test_a_rank_that_is_killed_or_stopped_ends_steps_with_its_reason(folder, number, seconds, monkeypatch):
    monkeypatch.setattr("node.model.parallel.group.COLLECTIVE_SECONDS", seconds)
    reasons: list[str] = []
    team = open_team(["cpu", "cpu"], on_lost=reasons.append)
    try:
        span = load_sharded(team, folder, 0, 2)
        cache, hidden = span.new_cache(1, 64), torch.randn(1, 1, span.hidden_size)
        span.forward(hidden, cache, 0)
        process = team._workers[0].process
        process.send_signal(number)

        def go_on() -> None:
            for position in range(1, 64):
                span.forward(hidden, cache, position)

        with pytest.raises(SpanLost) as lost:
            go_on()
        assert "tensor parallelism over 2 devices has ended" in str(lost.value)
        with pytest.raises(SpanLost):  # and no later step waits
            span.new_arena(16)
        assert len(reasons) == 1
    finally:
        team._workers[0].process.kill()
        team.close()


def test_a_step_that_takes_too_long_is_ended_although_no_operation_ends_it(folder, monkeypatch):
    """So it is on a GPU: there nothing else watches sums within graphs."""
    monkeypatch.setattr("node.model.parallel.team.CPU_STEP_SECONDS", 1.0)
    reasons: list[str] = []
    team = open_team(["cpu", "cpu"], on_lost=reasons.append)
    try:
        span = load_sharded(team, folder, 0, 2)
        cache, hidden = span.new_cache(1, 64), torch.randn(1, 1, span.hidden_size)
        span.forward(hidden, cache, 0)
        process = team._workers[0].process
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(SpanLost, match="a step took too long, a rank hangs"):
            span.forward(hidden, cache, 1)
        assert process.wait(10) == -signal.SIGKILL
        assert len(reasons) == 1
    finally:
        team._workers[0].process.kill()
        team.close()


def test_free_memory_is_asked_of_the_ranks(folder):
    team = open_team(["cpu", "cpu", "cpu"])
    try:
        assert team.free_bytes() == [0, 0]  # a CPU's memory is the node's to count
    finally:
        team.close()


def test_an_idle_team_notices_the_end_of_a_rank(folder):
    reasons: list[str] = []
    team = open_team(["cpu", "cpu"], on_lost=reasons.append)
    try:
        team._workers[0].process.kill()
        until = time.monotonic() + GENEROUS_SECONDS
        while not reasons and time.monotonic() < until:
            time.sleep(0.01)
        assert "rank 1 was ended by SIGKILL" in reasons[0]
    finally:
        team.close()


def test_no_rank_outlives_rank_0():
    script = (
        "from node.model.parallel.team import open_team; import time\n"
        "print(open_team(['cpu', 'cpu'])._workers[0].process.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + GENEROUS_SECONDS
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the rank still runs"
        time.sleep(0.01)
