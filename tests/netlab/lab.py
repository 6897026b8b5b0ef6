"""A lab that runs: takes the steps of a topology, and starts programs on its hosts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from types import TracebackType
from typing import Any

from tests.netlab.line import TUN
from tests.netlab.namespaces import LabError, Namespaces, Program
from tests.netlab.rules import Kind
from tests.netlab.topology import (
    INTERNET,
    Cable,
    Home,
    Host,
    Ip,
    Line,
    Namespace,
    Rules,
    Setting,
    Step,
    Topology,
)

_TOOLS = ("ip", "nsenter", "unshare", "setpriv")
_SETTINGS = (  # of each host, before its devices are there
    ("net.ipv4.tcp_no_metrics_save", "1"),  # each connection measures its line anew
    ("net.ipv6.conf.default.accept_dad", "0"),  # else a router solicits no neighbour in its first second
)


def _tool(name: str) -> str | None:
    """The path of a program, also of those for administrators, which a user's PATH may leave out."""
    return shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    )


@cache
def cannot(*, homes: bool = True, lines: bool = True) -> str | None:
    """The reason why no lab can be made here, in a few words; None where one can.

    homes, lines: whether the lab is to have them; public hosts need the least.
    """
    missing = [tool for tool in (*_TOOLS, *(["nft"] if homes else [])) if _tool(tool) is None]
    if missing:
        return f"missing: {', '.join(missing)} (packages iproute2, nftables, util-linux)"
    if lines and not TUN.exists():
        return f"there is no {TUN} here"
    try:
        with Lab() as lab:
            lab.public("p1", Line(0) if lines else None)
            if homes:
                lab.home("a", "cone")
    except LabError as error:
        return str(error)
    return None


class Lab:
    """A running lab; all of it ends with the block, and with the thread that made it.

    Every method raises LabError where a command of the system fails, and ValueError as `Topology` says.
    """

    def __init__(self, *, here: bool = False) -> None:
        """here: this process is on the Internet (see `command_inside`), at `hosts["internet"].ip4`."""
        self._topology = Topology()
        self._namespaces = Namespaces(INTERNET, here=here)

    def __enter__(self) -> Lab:
        try:
            self._set_up(INTERNET)
            self._take(self._topology.internet())
        except BaseException:
            self._namespaces.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._namespaces.close()

    # --- the topology ---

    @property
    def hosts(self) -> Mapping[str, Host]:
        """Every host and router, and the Internet itself, by name."""
        return self._topology.hosts

    @property
    def homes(self) -> Mapping[str, Home]:
        """Every home, by name."""
        return self._topology.homes

    def public(self, name: str, line: Line | None = None) -> Host:
        """A host with public addresses and no filter."""
        self._take(self._topology.public(name, line))
        return self.hosts[name]

    def home(
        self, name: str, kind: Kind, hosts: int = 1, line: Line | None = None, *, ipv6: bool = True
    ) -> list[Host]:
        """A router, and on its LAN the hosts `name`1, `name`2...; line: of the router."""
        self._take(self._topology.home(name, kind, hosts, line, ipv6=ipv6))
        return [self.hosts[each] for each in self._topology.homes[name].hosts]

    def forward(self, home: str, port: int, host: str) -> None:
        """A TCP port of a router leads to the same port of a host."""
        self._take(self._topology.forward(home, port, host))

    def forget(self, home: str) -> None:
        """A router starts again: established connections go dark where its tracking is forgotten too."""
        self._take(self._topology.forget(home))
        if (conntrack := _tool("conntrack")) is not None:
            self.run(home, [conntrack, "-F"])

    def readdress(self, host: str, ip4: str) -> None:
        """A host gets another IPv4 address, as a laptop that changes networks."""
        self._take(self._topology.readdress(host, ip4))

    def bridge(self, host: str, device: str, ip4: str) -> None:
        """A bridge of a host's own with an address, as a container engine makes it."""
        self._take(self._topology.bridge(host, device, ip4))

    def cut(self, host: str) -> None:
        """Pull a host's cable: no packet passes, and no connection is reset."""
        self._take(self._topology.cut(host))

    def mend(self, host: str) -> None:
        """Put a host's cable in again."""
        self._take(self._topology.mend(host))

    # --- programs ---

    def enter(self, host: str) -> list[str]:
        """The words before a command, to run it on a host: the command replaces them in their process."""
        return self._namespaces.enter(host)

    def popen(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a host, in the root of the project; it is killed at the end of the lab.

        options: of `subprocess.Popen`, and of its types, hence Any.
        """
        return self._namespaces.popen(host, command, **options)

    def worker(self, host: str, module: str, arguments: Sequence[str]) -> Program:
        """Start `python -m MODULE` on a host, with text in and out by pipes; killed at the end of the lab."""
        command = [sys.executable, "-m", module, *arguments]
        return self.popen(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def errors_of(self, process: Program) -> str:
        """What a worker has written to its standard error, where the lab has it; else ""."""
        return ""

    def keep(self, process: Program) -> None:
        """Kill this process at the end of the lab, too."""
        self._namespaces.keep(process)

    def run(self, host: str, command: Sequence[str], *, seconds: float = 30.0) -> str:
        """Run a command on a host; its output."""
        return self._namespaces.run(host, command, seconds=seconds)

    # --- the steps ---

    def _take(self, steps: Sequence[Step]) -> None:
        """Take steps in order; those of `ip` on one host, one after the other, are one process."""
        for host, several in groupby(steps, lambda step: step.host if isinstance(step, Ip) else ""):
            if host:
                lines = [step.words for step in several if isinstance(step, Ip)]
                self._ip(host, lines)
                continue
            for step in several:
                self._take_one(step)

    def _take_one(self, step: Step) -> None:
        match step:
            case Namespace(host):
                self._namespaces.make(host)
                self._set_up(host)
            case Setting(host, name, value):
                self._set(host, name, value)
            case Rules(host, text):
                self._namespaces.run(host, [_tool("nft") or "nft", "-f", "-"], text)
            case Cable() as cable:
                self._plug(cable)
            case Ip(host, words):
                self._ip(host, [words])

    def _plug(self, cable: Cable) -> None:
        ours, theirs = (self._namespaces.pid(each) for each in (cable.bridge_host, cable.host))
        port, device = cable.port, cable.device
        lines = [f"link set {port} master {cable.bridge} up"]
        if cable.line is None:
            lines.insert(0, f"link add {port} type veth peer name {device} netns {theirs}")
        else:
            line = (cable.line.milliseconds, cable.line.mbit, cable.line.queue_ms)
            words = [ours, port, theirs, device, *line]
            command = [sys.executable, "-m", "tests.netlab.line", *map(str, words)]
            process = self._namespaces.outside(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stdout is not None
            assert process.stderr is not None
            if process.stdout.readline() != b"up\n":
                raise LabError(f"no line to {cable.host}: {process.stderr.read().decode().strip()}")
        self._ip(cable.bridge_host, lines)
        self._ip(cable.host, [f"link set {device} up"])

    def _ip(self, host: str, lines: Sequence[str]) -> None:
        try:
            self._namespaces.run(host, ["ip", "-batch", "-"], "\n".join(lines) + "\n")
        except LabError as error:
            raise LabError(f"{error} (of: {'; '.join(lines)})") from error

    def _set_up(self, host: str) -> None:
        for name, value in _SETTINGS:
            self._set(host, name, value)

    def _set(self, host: str, name: str, value: str) -> None:
        path = f"/proc/sys/{name.replace('.', '/')}"
        self._namespaces.run(host, ["sh", "-c", 'printf %s "$1" > "$2"', "sh", value, path])
