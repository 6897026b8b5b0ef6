"""Compiled functions: of processes that start at once one compiles, and no process waits for ever."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")

from node.model.weights import compiling, kernel_cache  # noqa: E402  # they import numba
from tests.processes import ROOT  # noqa: E402


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
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the compiled kernels."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    found = kernel_cache.opened()
    assert found is not None
    return found


@pytest.fixture
def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(compiling, "njit", fake)
    return fake


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(compiling, "time", fake)
    return fake


@pytest.fixture
def other_process(folder: Path) -> Iterator[int]:
    """Another process's open lock file: a lock belongs to it and not to a process."""
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


def other_answer() -> int:
    return 2


def test_of_several_functions_those_come_first_that_no_other_process_compiles(
    compiler: Compiler, clock: Clock, other_process: int
):
    fcntl.flock(other_process, fcntl.LOCK_EX)
    seen: list[str] = []

    def kernel(function: Callable[..., Any]) -> None:
        compiling.compiled(function, "int64()")
        seen.append(function.__name__)
        if function is other_answer:  # meanwhile the other process has finished
            fcntl.flock(other_process, fcntl.LOCK_UN)

    compiling.in_any_order([partial(kernel, answer), partial(kernel, other_answer)])
    assert seen == ["other_answer", "answer"]
    assert clock.seconds == 0.0


def test_functions_that_another_process_compiles_for_ever_are_compiled_after_a_wait(
    compiler: Compiler, clock: Clock, other_process: int
):
    fcntl.flock(other_process, fcntl.LOCK_EX)
    compiling.in_any_order([partial(compiling.compiled, answer, "int64()")])
    assert compiler.asked == [True]
    assert compiling.WAIT_SECONDS <= clock.seconds < compiling.WAIT_SECONDS + 1


def test_without_a_folder_each_process_compiles_in_memory(
    compiler: Compiler, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    assert compiling.compiled(answer, "int64()") is answer
    assert (compiler.asked, clock.seconds) == ([False], 0.0)


OF_OURS = compile("def twice(x):\n    return 2 * x\n", str(kernel_cache.HERE / "weights/kernels.py"), "exec")


def compiled_here() -> tuple[int, int]:
    """How often a function was compiled, and how often it was read."""
    names: dict[str, Any] = {"__name__": __name__}
    exec(OF_OURS, names)
    kernel: Any = compiling.compiled(names["twice"], "int64(int64)")
    assert kernel(21) == 42
    return sum(kernel.stats.cache_misses.values()), sum(kernel.stats.cache_hits.values())


def test_a_broken_file_is_compiled_anew(folder: Path):
    assert [compiled_here(), compiled_here()] == [(1, 0), (0, 1)]
    [data] = folder.glob("*.nbc")
    data.write_bytes(data.read_bytes()[:100])
    assert [compiled_here(), compiled_here()] == [(1, 0), (0, 1)]


AS_A_PROCESS = """
import sys
from tests.unit.test_compiling import compiled_here
print("ready", flush=True)
sys.stdin.readline()
print(*compiled_here())
"""


def test_of_processes_that_start_at_once_one_compiles(tmp_path: Path):
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", AS_A_PROCESS],
                    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
                )
            )
            for _ in range(2)
        ]  # fmt: skip
        for process in started:
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sorted(process.stdout.read() for process in started) == ["0 1\n", "1 0\n"]
