"""Peers on the hosts of a lab, as their driver sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import psutil

from tests.netlab.lab import Lab
from tests.netlab.namespaces import LabError


class Answerer:
    """A program on a host of a lab that answers lines of JSON; it ends with the lab."""

    def __init__(self, lab: Lab, host: str, module: str, arguments: Sequence[str] = ()) -> None:
        self.host, self._lab = host, lab
        self.started_at = time.time()
        self.process = lab.worker(host, module, arguments)

    def kill(self) -> None:
        """Kill it, and wait until it has ended: its ports are free then."""
        self.process.kill()
        self.process.wait()

    def tell(self, order: object) -> None:
        """Give an order, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:  # Any: JSON
        """Wait for its next line.  Raises LabError where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self._lab.errors_of(self.process)
            raise LabError(f"{self.host}: a program ended with exit code {self.process.wait()}\n{said}")
        return json.loads(line)

    def ask(self, order: object) -> Any:  # Any: JSON
        """Give an order and wait for its answer."""
        self.tell(order)
        return self.hear()


class Peer(Answerer):
    """A process of `benchmarks.reach.peer`.

    peer: its id.  address: the first one that it announces.
    """

    peer: str
    addresses: list[str]

    def __init__(
        self,
        lab: Lab,
        host: str,
        peers: Sequence[str] = (),
        flags: Sequence[str] = (),
        *,
        wait: bool = True,
    ) -> None:
        """Wait until it takes part, unless `take_part` is called later.  Raises LabError."""
        join = ["--peers", *peers] if peers else []
        super().__init__(lab, host, "benchmarks.reach.peer", [*join, *flags])
        if wait:
            self.take_part()

    def take_part(self) -> None:
        """Wait until it takes part.  Raises LabError."""
        facts = self.hear()
        self.peer, self.addresses = facts["peer"], facts["addresses"]

    @property
    def address(self) -> str:
        """For --peers of others."""
        return self.addresses[0]

    def do(self, what: str, **more: object) -> Any:  # Any: JSON
        """Give an order of `benchmarks.reach.peer`; its answer.  Raises LabError where that is an error."""
        answer = self.ask({"do": what, **more})
        if "error" in answer:
            raise LabError(f"{self.host}: {what}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        """Resident memory now, in MiB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)


def bytes_through(lab: Lab, host: str) -> int:
    """Bytes that a host or a router has received from the Internet or its LAN so far."""
    device = lab.hosts[host].device
    (facts,) = json.loads(lab.run(host, ["ip", "-j", "-s", "link", "show", "dev", device]))
    return int(facts["stats64"]["rx"]["bytes"])
