"""Processes of tests: each ends, and its pipes close, with the block that started it, also after an error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS = 5.0


@contextmanager
def running(
    command: Sequence[str],
    *,
    cwd: Path = ROOT,
    stderr: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process with its output in pipes; killed at the end of the block if it still runs.

    environment: all its variables; None: those of this process.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    with process:  # waits for the end and closes the pipes
        try:
            yield process
        finally:
            process.kill()


def python(*words: object) -> list[str]:
    """The command line of `python -m WORDS`, with this interpreter."""
    return [sys.executable, "-m", *map(str, words)]


def line_of(process: subprocess.Popen[str], start: str) -> str:
    """The first line of standard error with this start.  Fails at the end of the output."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if line.startswith(start):
            return line
        seen.append(line)
    raise AssertionError(f"no line starts with {start!r}: {seen}")


def children() -> set[psutil.Process]:
    """Every process below this one, but the helpers that Python's own multiprocessing keeps.

    The forks of those helpers count.
    """
    return {child for child in psutil.Process().children(recursive=True) if not _is_python_s_own(child)}


def _is_python_s_own(process: psutil.Process) -> bool:
    try:
        return process.ppid() == os.getpid() and "multiprocessing" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def end(processes: set[psutil.Process]) -> list[str]:
    """Kill processes and wait for their ends; the command lines of those that ran."""
    ran = []
    for process in processes:
        try:
            ran.append(" ".join(process.cmdline()))
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(list(processes), END_SECONDS)
    return ran
