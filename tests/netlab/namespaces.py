"""Network namespaces without names: each is held by a process, and all end with the process that made them.

Linux, as root or as any user that may make user namespaces.  Each host also has a mount namespace with a /sys
of its own, where programs find out what a network interface is.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 30.0  # for one command that is not left running
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_HOLD = "ip link set lo up && { mount -t sysfs sysfs /sys 2>/dev/null; echo up; exec sleep infinity; }"
_FLAGS = {"user": 0x10000000, "mnt": 0x00020000, "net": 0x40000000}  # CLONE_NEW... of setns(2)

Of = Literal["user", "mnt", "net"]


class LabError(Exception):
    """A command failed, mostly for lack of privileges; the message is what it said."""


class Program(Protocol):
    """The part of a `subprocess.Popen` that the end of a lab needs.

    stdin, stdout, stderr: streams or None, of the types of Popen, hence Any.
    """

    stdin: Any
    stdout: Any
    stderr: Any

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def wait(self) -> int:
        """Wait for its end; the exit code."""

    def send_signal(self, sig: int, /) -> None:
        """Nothing happens where it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


def command_inside(module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a Python module in a network namespace of its own: for `Lab(here=True)`."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--", sys.executable, "-m", module, *arguments]


def enter(pid: int, kinds: Sequence[Of]) -> None:
    """Move the calling thread into namespaces of a process.  Raises OSError.

    With "user" or "mnt" the process must have one thread; the working directory is then /.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    descriptors = [(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), kind) for kind in kinds]
    try:
        for descriptor, kind in descriptors:
            if libc.setns(descriptor, _FLAGS[kind]):
                raise OSError(ctypes.get_errno(), f"setns {kind}: {os.strerror(ctypes.get_errno())}")
    finally:
        for descriptor, _ in descriptors:
            os.close(descriptor)


def entered(prefix: Sequence[str]) -> tuple[int, list[Of], int] | None:
    """Read a prefix of `Namespaces.enter`: the process, its namespaces in order, the number of words.

    None for any other words.
    """
    if list(prefix[:2]) != ["nsenter", "--target"]:
        return None
    end = list(prefix).index("--")
    options = prefix[3:end]
    kinds: list[Of] = ["user"] if "--user" in options else []
    return int(prefix[2]), [*kinds, "mnt", "net"], end + 1


class Namespaces:
    """The namespaces by their hosts' names, and the processes that were started in them.

    here: the first one is that of this process (see `command_inside`).
    """

    def __init__(self, first: str, *, here: bool) -> None:
        """Make the first one.  Raises LabError."""
        self._first, self._here = first, here
        self._user = os.geteuid() != 0  # then everything is in a user namespace of our own
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[Program] = []
        if here:
            self.run(first, ["ip", "link", "set", "lo", "up"])
        else:
            self.make(first)

    def make(self, name: str) -> None:
        """One more.  Raises LabError."""
        first = not self._holders and not self._here
        user = ["--user", "--map-root-user"] if self._user and first else []
        command = [
            *_DIES_WITH_US,
            *([] if first else self._as_our_user()),
            "unshare",
            *user,
            "--net",
            "--mount",
        ]
        try:
            process = subprocess.Popen(
                [*command, "--", "sh", "-c", _HOLD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError as missing:
            raise LabError(f"there is no {missing.filename} here") from missing
        self._holders[name] = process
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"up\n":
            said = process.stderr.read().decode().strip()
            self.close()
            raise LabError(f"no network namespace: {said}")

    def close(self) -> None:
        """End every namespace and every process that was started in them."""
        processes: list[Program] = [*self._others, *self._holders.values()]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._others.clear()
        self._holders.clear()

    def pid(self, name: str) -> int:
        """A process in this namespace."""
        return os.getpid() if self._here and name == self._first else self._holders[name].pid

    def enter(self, name: str) -> list[str]:
        """The words before a command, to run it there: the command replaces them in their process."""
        if self._here and name == self._first:
            return []
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self.pid(name)), *user, "--mount", "--net", "--wd", "--"]

    def popen(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command there, in the root of the project; it is killed at the end of all.

        options: of `subprocess.Popen`, and of its types, hence Any.
        """
        process = subprocess.Popen([*_DIES_WITH_US, *self.enter(name), *command], cwd=ROOT, **options)
        self.keep(process)
        return process

    def keep(self, process: Program) -> None:
        """One more process that is killed at the end of all."""
        self._others.append(process)

    def outside(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command that enters namespaces by itself; as `popen`."""
        process = subprocess.Popen([*_DIES_WITH_US, *self._as_our_user(), *command], cwd=ROOT, **options)
        self.keep(process)
        return process

    def run(self, name: str, command: Sequence[str], text: str = "", seconds: float = RUN_SECONDS) -> str:
        """Run a command there with `text` as standard input; its output.  Raises LabError."""
        words = " ".join(command)
        try:
            done = subprocess.run(
                [*self.enter(name), *command], cwd=ROOT, input=text, text=True, capture_output=True,
                check=False, timeout=seconds,
            )  # fmt: skip
        except FileNotFoundError as missing:
            raise LabError(f"there is no {missing.filename} here") from missing
        except subprocess.TimeoutExpired as late:
            raise LabError(f"{name}: {words}: not within {seconds:g} s") from late
        if done.returncode:
            raise LabError(f"{name}: {words}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _as_our_user(self) -> list[str]:
        if not self._user:
            return []
        return ["nsenter", "--target", str(self.pid(self._first)), "--user", "--preserve-credentials", "--"]
