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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

from node.serving import served_span
from node.serving.executor.rates import rates_at_start
from tests.netlab.namespaces import Of, enter, entered
from tests.processes import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
MEASURE_SECONDS = 0.02
Stream = Path | Connection  # a file, or an end of a pipe


class Forked:
    """A `subprocess.Popen` of a command `python -m MODULE ...` or `python FILE ...`, as far as tests need it.

    The command may begin with the words of `Lab.enter`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        output: Stream,
        errors: Path | None = None,
        given: Stream = Path(os.devnull),
    ) -> None:
        """output: of both streams; errors: of standard error, apart.  given: as standard input."""
        namespaces = entered(command)
        if namespaces is not None:
            command = command[namespaces[2] :]
        python, *words = command
        assert python == sys.executable, f"only this Python is forked: {command}"
        assert words[0] == "-m" or words[0].endswith(".py"), f"neither a module nor a file: {command}"
        self.args = command
        streams = (given, output, errors or output)
        self._process = CONTEXT.Process(target=_run, args=(words, dict(environment), streams, namespaces))
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


class ForkedWithPipes(Forked):
    """One with a pipe to its standard input and one from its output; standard error goes to a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], errors: Path) -> None:
        given, stdin = CONTEXT.Pipe(duplex=False)
        stdout, output = CONTEXT.Pipe(duplex=False)
        with given, stdin, stdout, output:
            super().__init__(command, environment, output, errors, given)
            self.stdin: TextIO = os.fdopen(os.dup(stdin.fileno()), "w")
            self.stdout: TextIO = os.fdopen(os.dup(stdout.fileno()))
        self.stderr = None


def _run(
    words: Sequence[str],
    environment: Mapping[str, str],
    streams: tuple[Stream, Stream, Stream],
    namespaces: tuple[int, list[Of], int] | None,
) -> None:
    """The forked process: it runs as `python WORDS` from here on."""
    given, output, errors = streams
    _open_as(given, os.O_RDONLY, 0)
    _open_as(output, os.O_WRONLY, 1)
    if errors == output:
        os.dup2(1, 2)
    else:
        _open_as(errors, os.O_WRONLY, 2)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    if namespaces is not None:
        enter(*namespaces[:2])
    os.chdir(ROOT)
    vars(served_span)["rates_at_start"] = partial(rates_at_start, seconds=MEASURE_SECONDS)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _open_as(stream: Stream, flags: int, descriptor: int) -> None:
    """Put a stream in the place of a descriptor; a file is begun anew where it is written."""
    if isinstance(stream, Path):
        written = os.O_CREAT | os.O_TRUNC if flags == os.O_WRONLY else 0
        opened = os.open(stream, flags | written)
        os.dup2(opened, descriptor)
        os.close(opened)
    else:
        with stream:
            os.dup2(stream.fileno(), descriptor)
