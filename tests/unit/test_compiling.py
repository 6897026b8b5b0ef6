"""Compiled functions: of processes that start at once one compiles, and no process waits for ever."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")

from node.model.weights import compiling  # noqa: E402  # it imports numba


def answer() -> int:
    return 1


LOCK = f"{answer.__module__}.{answer.__name__}.lock"


class Compiler:
    """In numba's place.  holding: called while it compiles."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.holding: Callable[[], object] = lambda: None

    def __call__(self, signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def made(function: Callable[..., Any]) -> Callable[..., Any]:
            self.asked.append(options.get("cache", False))
            self.holding()
            return function

        return made


class Clock:
    """In the place of the module `time`.  seconds: that were slept; goes_on: whether a sleep ends."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.slept, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.slept.set()
        assert self.goes_on.wait(10)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(compiling, "njit", fake)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(compiling, "time", fake)
    return fake


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[int]:
    """Another process's open lock file: a lock belongs to it and not to a process."""
    folder = tmp_path / "cache"
    folder.mkdir()
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    yield file
    os.close(file)


def test_who_finds_another_one_compiling_waits_for_it(compiler: Compiler, clock: Clock, other_process: int):
    clock.goes_on.clear()
    fcntl.flock(other_process, fcntl.LOCK_EX)
    waiting = threading.Thread(target=compiling.compiled, args=(answer, "int64()"))
    waiting.start()
    assert clock.slept.wait(10)
    assert compiler.asked == []
    fcntl.flock(other_process, fcntl.LOCK_UN)
    clock.goes_on.set()
    waiting.join(10)
    assert compiler.asked == [True]


def test_who_compiles_holds_the_lock_and_gives_it_back(compiler: Compiler, clock: Clock, other_process: int):
    def holding() -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other_process, fcntl.LOCK_EX | fcntl.LOCK_NB)

    compiler.holding = holding
    assert compiling.compiled(answer, "int64()") is answer
    fcntl.flock(other_process, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (compiler.asked, clock.seconds) == ([True], 0.0)


def test_the_wait_for_another_compiler_ends(compiler: Compiler, clock: Clock, other_process: int):
    fcntl.flock(other_process, fcntl.LOCK_EX)
    assert compiling.compiled(answer, "int64()") is answer
    assert compiling.WAIT_SECONDS <= clock.seconds < compiling.WAIT_SECONDS + 1


def test_another_function_is_not_waited_for(compiler: Compiler, clock: Clock, other_process: int):
    fcntl.flock(other_process, fcntl.LOCK_EX)
    assert compiling.compiled(min, "int64(int64, int64)") is min
    assert clock.seconds == 0.0


def test_without_a_folder_for_locks_each_process_compiles(
    compiler: Compiler, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    assert compiling.compiled(answer, "int64()") is answer
    assert clock.seconds == 0.0
