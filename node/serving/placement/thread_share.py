"""The threads of a serving node: the cores divided by the nodes that serve on the machine, which come and go.

Two OpenMP threads lose five to twenty times their speed when another process takes a core, so a node takes
fewer as soon as another one starts, and more once it is gone.  A node has a locked file (flock) in the user's
cache as long as it runs; the kernel unlocks it however the process ends.  A look at these files costs
microseconds.  When they change, command lines are counted too, for nodes with another cache or user.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

log = logging.getLogger("raceme")

LOOK_SECONDS = 1.0  # between two looks at the files: 0.1 ms each
COUNT_SECONDS = 5.0  # after a change command lines are counted (20 ms) as long: a process takes time to end
MORE_SECONDS = 10.0  # a node that is started again is back before: others do not take its cores meanwhile
MAX_NODES = 4096  # of which files are looked at
_SUFFIX = ".node"
_LOCK_TRIES, _LOCK_SECONDS = 1000, 0.001  # another process that looks holds the lock for microseconds
DIRECTORY_COMMANDS = {"bootstrap", "status", "models", "prepare", "new-swarm-key"}


@dataclass(slots=True)
class ThreadShare:
    """Decides how many threads a node takes; looks, counts and sets nothing.

    cores: that the process may use.  threads: taken now, in each process.  ranks: processes that divide the
    node's blocks and its cores.  Fewer threads are taken at once, more only when the nodes have been fewer
    for MORE_SECONDS.
    """

    cores: int
    threads: int
    ranks: int = 1
    _more_since: float | None = None

    def look(self, nodes: int, now: float) -> int | None:
        """The new number of threads, None where it stays.  nodes: that serve on this machine, this one
        included; now: seconds of any clock."""
        wanted = threads_for(self.cores, nodes, self.ranks)
        if wanted <= self.threads:
            self._more_since = None
        elif self._more_since is None:
            self._more_since = now
        if wanted == self.threads or (self._more_since is not None and now - self._more_since < MORE_SECONDS):
            return None
        self._more_since = None
        self.threads = wanted
        return wanted


def threads_for(cores: int, nodes: int, ranks: int = 1) -> int:
    """An equal part of the cores for each of a node's `ranks` processes, and so for each node; at least 1."""
    return max(1, cores // max(1, nodes) // ranks)


def cores_of_this_process() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Presence:
    """The nodes that serve on this machine, as their locked files tell.

    folder: of the files; None: there is none that can be used, and nobody is seen.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def nodes(self) -> frozenset[str]:
        """The names of the files that a running node has locked.  Files of nodes that ended are removed."""
        found: set[str] = set()
        if self._folder is None:
            return frozenset()
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry, _ in zip(entries, range(MAX_NODES), strict=False):
                if entry.name.endswith(_SUFFIX) and _is_held(Path(entry.path)):
                    found.add(entry.name)
        return frozenset(found)


NOBODY = Presence(None)


@contextmanager
def presence(above: Path | None) -> Iterator[Presence]:
    """Be one of the nodes that serve on this machine, for the time of the block.

    above: the user's cache folder.  Where it has no room or no locks, this node is not seen by others.
    """
    folder, held = None, None
    if above is not None:
        folder = above / "serving"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = _take(folder)
        except OSError as error:
            log.debug("other nodes on this machine do not see this one: %s", error)
            folder = None
    try:
        yield Presence(folder)
    finally:
        if held is not None:
            path, descriptor = held
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _take(folder: Path) -> tuple[Path, int]:
    """A new file and its locked descriptor.  Raises OSError."""
    for _ in range(_LOCK_TRIES):
        path = folder / f"{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return path, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # somebody looked between the two, and took it for a file that nobody has
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        os.close(descriptor)
        path.unlink(missing_ok=True)
        time.sleep(_LOCK_SECONDS)
    raise OSError(errno.EBUSY, "the file of this node was taken away each time", str(folder))


def _is_held(path: Path) -> bool:
    """Whether a process has this file locked; a file that nobody has is removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def servers_on_this_machine() -> int:
    """Running `python -m node` processes that serve blocks, this one included; takes 20 ms."""
    found = sum(serves_blocks(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return max(found, 1)


def serves_blocks(words: Sequence[str]) -> bool:
    """Whether this command line runs a serving node; a program that started one does not count."""
    if not words or not Path(words[0]).name.startswith("python") or "-m" not in words:
        return False
    after = words[words.index("-m") + 1 :]
    return after[:1] == ["node"] and not DIRECTORY_COMMANDS.intersection(after[1:2])


def threads_at_start(present: Presence, ranks: int = 1) -> int:
    """The part of this node when it starts, in each of its processes."""
    nodes = max(servers_on_this_machine(), len(present.nodes()))
    return threads_for(cores_of_this_process(), nodes, ranks)


async def follow(
    share: ThreadShare,
    present: Presence,
    change: Callable[[int, int], Awaitable[None]],
    count: Callable[[], int] = servers_on_this_machine,
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = trio.to_thread.run_sync,
) -> None:
    """Look every second, until cancelled, and have the threads changed where nodes have come or gone.

    change: is given the new number of threads, and the number of nodes.  count: the nodes by command lines.
    in_thread: runs a look, which reads files, beside the event loop.
    """
    seen: frozenset[str] | None = None
    counted, count_until = 1, 0.0
    while True:
        now = trio.current_time()
        names: frozenset[str] = await in_thread(present.nodes)
        if names != seen:
            seen, count_until = names, now + COUNT_SECONDS
        if now <= count_until:
            counted = await in_thread(count)
        nodes = max(counted, len(names))
        if (threads := share.look(nodes, now)) is not None:
            await change(threads, nodes)
        await trio.sleep(LOOK_SECONDS)
