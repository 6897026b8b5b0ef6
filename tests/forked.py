"""Processes of `python -m node` that have not to import torch first: a test starts many of them.

They are forked from a process that has imported the libraries and done nothing else.  From then on they are
as any other: signals, exit codes, output.  Only a server measures its speed at the start within 20
milliseconds.  A test of the start itself uses `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from benchmarks.network import netns
from node.serving import served_span
from node.serving.executor.rates import rates_at_start
from tests.processes import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
MEASURE_SECONDS = 0.02


class Forked:
    """A `subprocess.Popen` of a command `python -m MODULE ...` or `python FILE ...`, as far as tests need it.

    The command may begin with `ip netns exec NAME`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
        given: Path = Path(os.devnull),
    ) -> None:
        """output: of both streams; errors: of standard error, apart.  given: as standard input."""
        namespace = None
        if tuple(command[:3]) == ("ip", "netns", "exec"):
            namespace, command = command[3], command[4:]
        python, *words = command
        assert python == sys.executable, f"only this Python is forked: {command}"
        assert words[0] == "-m" or words[0].endswith(".py"), f"neither a module nor a file: {command}"
        self.args = command
        streams = (given, output, errors or output)
        self._process = CONTEXT.Process(target=_run, args=(words, dict(environment), streams, namespace))
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
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def forked_run(*words: object, seconds: float = 120, text: str = "") -> subprocess.CompletedProcess[str]:
    """The result of `subprocess.run` for `python -m WORDS` with `text` as its standard input.

    WORDS may begin with the path of a program in place of a module.  Raises subprocess.TimeoutExpired.
    """
    first = () if isinstance(words[0], Path) else ("-m",)
    command = [sys.executable, *first, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        given, output, errors = (Path(folder) / name for name in ("given", "output", "errors"))
        given.write_text(text)
        process = Forked(command, os.environ, output, errors, given)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())


def _run(
    words: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[Path, Path, Path],
    namespace: str | None,
) -> None:
    """The forked process: it runs as `python WORDS` from here on."""
    given, output, errors = streams
    with given.open("rb") as standard_input, output.open("wb") as file:
        os.dup2(standard_input.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if errors != output:
        with errors.open("wb") as file:
            os.dup2(file.fileno(), 2)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if namespace is not None:
        netns.enter(namespace)
    vars(served_span)["rates_at_start"] = partial(rates_at_start, seconds=MEASURE_SECONDS)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
