"""Processes of `python -m node` that have not to import torch first: a test starts many of them.

They are forked from a process that has imported the libraries and done nothing else.  From then on they are
as any other: signals, exit codes, output.  A test of the start itself, or of a command
line, uses `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.processes import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """What `subprocess.Popen` is for a command `python -m MODULE ...`, as far as tests need it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        python, flag, *words = command
        assert (python, flag) == (sys.executable, "-m"), f"only python -m is forked: {command}"
        self.args = command
        self._process = CONTEXT.Process(target=_run, args=(words, dict(environment), output))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.  Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, sig: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """The forked process: what `python -m WORDS` is from here on."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
