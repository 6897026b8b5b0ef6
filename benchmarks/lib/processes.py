"""Swarms of real processes on the loopback, for benchmarks and for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).resolve().parents[2]
ONLINE_SECONDS = 120.0
STOP_SECONDS = 15.0


class RunningProcess(Protocol):
    """What is asked of a node's process: the part of `subprocess.Popen` with this meaning."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> Any:  # Any: Popen's own type
        """The exit code; None as long as it is not known to have ended."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code.  Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int, /) -> None:
        """Nothing happens where it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


class Spawn(Protocol):
    """How a process is started."""

    def __call__(
        self, command: Sequence[str], environment: Mapping[str, str], output: Path
    ) -> RunningProcess:
        """Start a command in the root of the project, with its output in a file."""


def spawn(command: Sequence[str], environment: Mapping[str, str], output: Path) -> RunningProcess:
    """Start a new process."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


class ProcessError(Exception):
    """A process failed; the message holds the end of its log."""


@dataclass(slots=True)
class NodeProcess:
    """One `python -m node ...`.

    online_seconds: from its start to its ready-file; None until `wait_online`.
    """

    process: RunningProcess
    log: Path
    ready_file: Path
    started: float
    facts: dict[str, Any] = field(default_factory=dict)
    online_seconds: float | None = None

    @property
    def address(self) -> str:
        """The address for other nodes."""
        return str(self.facts["addresses"][0])

    def wait_online(self, seconds: float = ONLINE_SECONDS) -> None:
        """Wait for the ready-file.  Raises ProcessError."""
        deadline = time.monotonic() + seconds
        while not self.ready_file.exists():
            if self.process.poll() is not None:
                raise ProcessError(f"a node ended with exit code {self.process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessError(f"a node was not online after {seconds} s: {self.tail()}")
            time.sleep(0.01)
        self.facts = json.loads(self.ready_file.read_text())
        self.online_seconds = self.ready_file.stat().st_mtime - self.started

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def rss_mib(self) -> float:
        """Resident memory now, in MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def descriptors(self) -> int:
        """Open descriptors now (Linux)."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def freeze(self) -> None:
        """SIGSTOP: its sockets stay open, and it answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM, and SIGKILL after `seconds`; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.thaw()  # a frozen process takes no signal
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)


class LocalSwarm:
    """Nodes of one swarm on this machine.  Made by `local_swarm`."""

    def __init__(
        self,
        folder: Path,
        common: Sequence[str],
        network: Sequence[str],
        environment: Mapping[str, str],
        spawn: Spawn,
    ) -> None:
        self.folder = folder
        self._spawn = spawn
        self.nodes: list[NodeProcess] = []
        self._common = list(common)
        self._network = list(network)
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}

    @property
    def peers(self) -> list[str]:
        """The --peers of newcomers and clients."""
        return [node.address for node in self.nodes if node.facts][:1]

    def start(
        self, *flags: str, peers: Sequence[str] | None = None, prefix: Sequence[str] = ()
    ) -> NodeProcess:
        """Start a node, or with "bootstrap" first a directory; it joins the first one that is online.

        prefix: words before the command, for instance to run it in a network namespace; they must become
        the command by exec.  Does not wait.
        """
        number = len(self.nodes)
        ready, log = self.folder / f"node-{number}.json", self.folder / f"node-{number}.log"
        join = self.peers if peers is None else list(peers)
        common = self._network + ([] if flags[:1] == ("bootstrap",) else self._common)
        command = [*prefix, sys.executable, "-m", "node", *flags, *common, "--ready-file", str(ready)]
        if join:
            command += ["--peers", *join]
        node = NodeProcess(self._spawn(command, self._environment, log), log, ready, time.time())
        self.nodes.append(node)
        return node

    def start_spans(self, spans: Sequence[tuple[int, int]], *flags: str) -> None:
        """Start a node for each span and wait until all are online.  Raises ProcessError."""
        for start, stop in spans:
            self.start(*flags, "--blocks", f"{start}:{stop}").wait_online()


@contextmanager
def local_swarm(
    common: Sequence[str] = (),
    network: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    spawn: Spawn = spawn,
) -> Iterator[LocalSwarm]:
    """A swarm whose processes all end with the block.

    common: flags of every serving node; network: flags of serving and bootstrap nodes.  spawn: starts them.
    """
    with tempfile.TemporaryDirectory(prefix="raceme-swarm-") as folder:
        swarm = LocalSwarm(Path(folder), common, network, environment or {}, spawn)
        try:
            yield swarm
        finally:
            for node in swarm.nodes:
                if node.process.poll() is None:
                    node.process.send_signal(signal.SIGTERM)
            for node in swarm.nodes:
                node.stop()


def equal_spans(blocks: int, servers: int) -> list[tuple[int, int]]:
    """`servers` spans of about equal length that cover the model."""
    cuts = [round(blocks * i / servers) for i in range(servers + 1)]
    return list(pairwise(cuts))


def free_port() -> int:
    """A free port of the loopback."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Worker:
    """A Python process that answers one JSON line with another.  See `answer_lines`."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> Any:  # Any: JSON
        """Send a question and wait for its answer.  Raises ProcessError when the process ends instead."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:  # Any: JSON
        """Wait for a further answer to the last question.  Raises ProcessError."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ProcessError(f"a worker ended with exit code {self.process.wait()}")
        return json.loads(line)

    def rss_mib(self) -> float:
        """Resident memory now, in MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def answer_lines(answer: Callable[[Any], object]) -> None:
    """The other end of a Worker: answer questions until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
