"""The threads that a node takes as others on its machine come and go, and the files by which it sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from node.serving.placement import thread_share
from node.serving.placement.thread_share import (
    MORE_SECONDS,
    Presence,
    ThreadShare,
    presence,
    serves_blocks,
    threads_at_start,
    threads_for,
)

HOLD = """
import sys, time
from pathlib import Path
from node.serving.placement.thread_share import presence
with presence(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("words", "serves"),
    [
        (["python", "-m", "node"], True),
        (["/usr/bin/python3.11", "-X", "dev", "-m", "node", "some/model", "--blocks", "0:2"], True),
        (["python", "-m", "node", "bootstrap"], False),
        (["python", "-m", "node", "status", "--peers", "x"], False),
        (["python", "-m", "node", "prepare", "m", "out"], False),
        (["python", "-m", "node", "--name", "status"], True),
        (["timeout", "40", "python", "-m", "node"], False),
        (["python", "-m", "client", "generate"], False),
        (["python", "-m"], False),
        ([], False),
    ],
)
def test_a_serving_node_is_known_by_its_command_line(words: list[str], serves: bool):
    assert serves_blocks(words) is serves


def test_cores_are_divided_by_the_nodes_on_the_machine():
    assert [threads_for(8, nodes) for nodes in (1, 3, 8, 9, 0)] == [8, 2, 1, 1, 8]
    assert [threads_for(8, nodes, ranks=2) for nodes in (1, 3, 8)] == [4, 1, 1]


def test_a_node_that_starts_counts_itself_once_and_others_by_file_or_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(thread_share, "servers_on_this_machine", lambda: 1)
    with presence(tmp_path) as first:
        assert threads_at_start(first) == 8
        with presence(tmp_path) as second:
            assert threads_at_start(second) == 4
        monkeypatch.setattr(thread_share, "servers_on_this_machine", lambda: 3)
        assert threads_at_start(first) == 2
        assert threads_at_start(first, ranks=2) == 1


def test_fewer_threads_are_taken_at_once():
    share = ThreadShare(8, 8)
    assert share.look(1, 0.0) is None
    assert share.look(2, 1.0) == 4
    assert share.look(2, 2.0) is None
    assert share.look(9, 3.0) == 1
    assert share.threads == 1


def test_ranks_divide_the_threads_of_their_node():
    share = ThreadShare(8, 4, ranks=2)
    assert share.look(1, 0.0) is None
    assert share.look(2, 1.0) == 2
    assert share.look(1, 2.0) is None
    assert share.look(1, 2.0 + MORE_SECONDS) == 4


def test_more_threads_are_taken_when_the_others_stay_away():
    share = ThreadShare(8, 2)
    assert share.look(1, 100.0) is None
    assert share.look(1, 100.0 + MORE_SECONDS - 0.1) is None
    assert share.look(1, 100.0 + MORE_SECONDS) == 8
    assert share.look(1, 100.0 + 2 * MORE_SECONDS) is None


def test_a_node_that_is_started_again_keeps_its_cores():
    share = ThreadShare(8, 4)
    assert share.look(1, 100.0) is None
    assert share.look(2, 105.0) is None  # it is back
    assert share.look(1, 106.0) is None  # and gone again: the time begins anew
    assert share.look(1, 106.0 + MORE_SECONDS - 0.1) is None
    assert share.look(1, 106.0 + MORE_SECONDS) == 8


def test_a_node_is_seen_as_long_as_it_runs(tmp_path: Path):
    with presence(tmp_path) as one:
        assert len(one.nodes()) == 1
        with presence(tmp_path) as two:
            assert one.nodes() == two.nodes()
            assert len(one.nodes()) == 2
        assert len(one.nodes()) == 1
    assert Presence(tmp_path / "serving").nodes() == frozenset()
    assert os.listdir(tmp_path / "serving") == []


def test_a_node_that_is_killed_is_not_seen_any_more_and_its_file_is_removed(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        seen = Presence(tmp_path / "serving")
        assert len(seen.nodes()) == 1
        process.kill()
    assert len(os.listdir(tmp_path / "serving")) == 1
    assert seen.nodes() == frozenset()
    assert os.listdir(tmp_path / "serving") == []


def test_files_of_others_are_left_alone(tmp_path: Path):
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "notes.txt").touch()
    with presence(tmp_path) as one:
        assert len(one.nodes()) == 1
    assert os.listdir(tmp_path / "serving") == ["notes.txt"]


def test_without_a_cache_that_can_be_written_a_node_runs_and_sees_nobody(tmp_path: Path):
    (tmp_path / "serving").touch()  # a file in the folder's place
    for above in (None, tmp_path):
        with presence(above) as alone:
            assert alone.nodes() == frozenset()
