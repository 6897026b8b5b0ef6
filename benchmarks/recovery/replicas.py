"""A swarm of processes with several servers for each span, which fail and come back on request."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.lib.processes import (
    ONLINE_SECONDS,
    LocalSwarm,
    NodeProcess,
    ProcessError,
    Spawn,
    free_port,
    local_swarm,
    spawn,
)
from routing.names import PeerId
from routing.view.view import SwarmView
from tests.netlab.lab import Lab
from tests.netlab.topology import INTERNET

LOOPBACK = "/ip4/127.0.0.1/tcp"
END_SECONDS = 60.0  # for a process to end after SIGTERM; draining takes at most 20 s
LOOK_SECONDS = 0.05  # between two looks of the supervisor
TURN_SECONDS = 0.05  # in which a slow server runs once: about the time of a token


@dataclass(frozen=True, slots=True)
class Link:
    """A server's own host in a lab, and its cable."""

    lab: Lab
    name: str

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return self.lab.hosts[self.name].ip4

    @property
    def prefix(self) -> list[str]:
        """The words before a command, to run it there."""
        return self.lab.enter(self.name)

    def down(self) -> None:
        """From here on no packet passes, and no connection is reset."""
        self.lab.cut(self.name)

    def up(self) -> None:
        """Packets pass again."""
        self.lab.mend(self.name)


@dataclass(slots=True)
class Replica:
    """One of a span's servers: one peer, in one process after another.

    peer: known once it has been online.  link: its way to the others, where it has a host of its own.
    ending: it was asked to end, which may take a while.
    """

    span: tuple[int, int]
    flags: tuple[str, ...]
    link: Link | None = None
    peer: PeerId | None = None
    ending: bool = False
    _node: NodeProcess | None = None

    @property
    def node(self) -> NodeProcess:
        """Its newest process, running or not."""
        assert self._node is not None, "not started"
        return self._node

    @property
    def running(self) -> bool:
        """Whether the process runs and was not asked to end, frozen or not."""
        return not self.ending and self.node.process.poll() is None

    @property
    def online(self) -> bool:
        """Whether it has come up, and is still running."""
        if not self.running or not self.node.ready_file.exists():
            return False
        if not self.node.facts:
            self.node.wait_online()
        return True

    def start(self, swarm: LocalSwarm, peers: Sequence[str]) -> None:
        """Start a process for it, once the one before has ended; does not wait for it."""
        if self._node is not None:
            self._node.process.wait(END_SECONDS)
        self.ending = False
        prefix = () if self.link is None else self.link.prefix
        self._node = swarm.start(*self.flags, peers=peers, prefix=prefix)

    def wait_online(self) -> None:
        """Wait for it.  Raises ProcessError."""
        self.node.wait_online()
        self.peer = PeerId(self.node.facts["peer_id"])

    def known(self, view: SwarmView) -> bool:
        """Whether a view has the record of this very process, and it is online."""
        if not self.online:
            return False
        record = None if self.peer is None else view.get(self.peer)
        if record is None or record.state != "online":
            return False
        return {f"{address}/p2p/{self.peer}" for address in record.addresses} == set(
            self.node.facts["addresses"]
        )


def kill(replica: Replica) -> None:
    """kill -9; does not wait for the end."""
    replica.ending = True
    replica.node.process.send_signal(signal.SIGKILL)


def freeze(replica: Replica) -> None:
    """SIGSTOP."""
    replica.node.freeze()


def drain(replica: Replica) -> None:
    """SIGTERM: it says good-bye and hands its sessions over."""
    replica.ending = True
    replica.node.process.send_signal(signal.SIGTERM)


def cut(replica: Replica) -> None:
    """Take its link down: no packet passes, and no connection is reset."""
    assert replica.link is not None, "only a server with a host of its own has a link"
    replica.link.down()


Fault = Callable[[Replica], None]
FAULTS: dict[str, Fault] = {"kill": kill, "freeze": freeze, "drain": drain, "halfopen": cut}


@dataclass(slots=True, eq=False)
class Slowdown:
    """A fault: the server runs for one `times`-th of the time, in short slices, until `close`.

    Unlike a frozen server it does all its work, and answers.
    """

    times: float
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __call__(self, replica: Replica) -> None:
        """Start the slowing."""
        self._threads.append(threading.Thread(target=self._run, args=(replica.node,), name="slowdown"))
        self._threads[-1].start()

    def _run(self, node: NodeProcess) -> None:
        while not self._over.is_set():
            began = time.perf_counter()
            time.sleep(TURN_SECONDS / self.times)
            node.freeze()
            ran = time.perf_counter() - began  # longer than asked for, on a busy machine
            self._over.wait(ran * (self.times - 1))
            node.thaw()

    def close(self) -> None:
        """End the slowing."""
        self._over.set()
        for thread in self._threads:
            thread.join()


@dataclass(slots=True)
class ReplicatedSwarm:
    """The servers, and a bootstrap node that everyone joins.  Made by `replicated_swarm`."""

    swarm: LocalSwarm
    bootstrap: NodeProcess
    replicas: list[Replica] = field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        """The addresses for clients."""
        return [self.bootstrap.address]

    def of(self, peer: str) -> Replica:
        """The replica that is this peer."""
        return next(replica for replica in self.replicas if replica.peer == peer)

    def others(self, replica: Replica) -> list[Replica]:
        """The other servers of its span."""
        return [other for other in self.replicas if other.span == replica.span and other is not replica]

    def start(self, replica: Replica) -> None:
        """Start it, perhaps again, with its identity.  Does not wait."""
        replica.start(self.swarm, self.peers)

    def bootstrap_again(self) -> None:
        """Keep a bootstrap node up: a new one joins the peers that are there."""
        if self.bootstrap.process.poll() is None:
            return
        known = [replica.node.address for replica in self.replicas if replica.online]
        self.bootstrap = self.swarm.start("bootstrap", peers=known)
        self.bootstrap.wait_online()

    def mend(self, wait: bool = True) -> None:
        """Undo every fault: thaw, connect and restart servers as needed.

        wait: until all are online.  Raises ProcessError.
        """
        self.bootstrap_again()
        for replica in self.replicas:
            if replica.link is not None:
                replica.link.up()
            if replica.running:
                replica.node.thaw()
            else:
                self.start(replica)
        for replica in self.replicas if wait else []:
            replica.wait_online()

    def whole(self, view: SwarmView) -> bool:
        """Whether a view has every server as it is now."""
        return all(replica.known(view) for replica in self.replicas)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """A thread restarts each ended server at once, while the block runs."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                for replica in self.replicas:
                    if not replica.running:
                        self.start(replica)

        thread = threading.Thread(target=watch, name="supervisor")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def replicated_swarm(
    spans: Sequence[tuple[int, int]],
    copies: int,
    *,
    model: str | None = None,
    flags: Sequence[str] = (),
    network: Sequence[str] = (),
    lab: Lab | None = None,
    proxied: Callable[[int], int] | None = None,
    spawn: Spawn = spawn,
) -> Iterator[ReplicatedSwarm]:
    """`copies` servers for each span, all online; all processes end with the block.

    flags: of the servers; network: of these and of the bootstrap node.  lab: each server gets a host of its
    own there, and this process is there too.  proxied: the port to dial for a listening port.  spawn: starts
    the processes.
    Raises ProcessError.
    """
    with local_swarm(flags, network, {"OMP_NUM_THREADS": "1"}, spawn) as swarm:
        here = [] if lab is None else ["--listen", f"/ip4/{lab.hosts[INTERNET].ip4}/tcp/0"]
        bootstrap = swarm.start("bootstrap", *here, peers=[])
        bootstrap.wait_online()
        found = ReplicatedSwarm(swarm, bootstrap)
        for number, (span, _) in enumerate(product(spans, range(copies))):
            link = None if lab is None else Link(lab, lab.public(f"server{number}").name)
            listen = [] if link is None else ["--listen", f"/ip4/{link.address}/tcp/0"]
            if proxied is not None:
                port = free_port()
                listen = ["--listen", f"{LOOPBACK}/{port}", "--announce", f"{LOOPBACK}/{proxied(port)}"]
            words = _words(model, span, swarm.folder / f"identity-{number}", listen)
            found.replicas.append(Replica(span, words, link))
            found.start(found.replicas[-1])
        for replica in found.replicas:
            replica.wait_online()
        yield found


def _words(
    model: str | None, span: tuple[int, int], identity: Path, listen: Sequence[str]
) -> tuple[str, ...]:
    what = [] if model is None else [model]
    return (*what, "--blocks", f"{span[0]}:{span[1]}", "--identity", str(identity), *listen)


def wait_until(condition: Callable[[], bool], seconds: float = ONLINE_SECONDS) -> float:
    """Look every few milliseconds until `condition` holds; the seconds it took.  Raises ProcessError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise ProcessError(f"not within {seconds} s")
        time.sleep(0.01)
    return time.monotonic() - began
