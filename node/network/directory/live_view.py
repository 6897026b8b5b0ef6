"""The present view of the swarm: records go in, a value comes out, and a task can wait for a change."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace

import trio

from routing.names import PeerId
from routing.view.view import Arrival, SwarmView, expire, merge

EXPIRY_SECONDS = 1.0  # a record that ended is noticed this much later, at the latest


class LiveView:
    """The one place that replaces the view.  `routing.view.view` decides the meaning of a record.

    swarm: its id.  bootstrap: addresses of peers that may have no record yet.
    silent: peers that do not answer; None without watching (see `routing.view.answers`).
    """

    def __init__(
        self,
        swarm: str,
        max_records: int,
        bootstrap: Mapping[PeerId, tuple[str, ...]],
        silent: Callable[[], Iterable[PeerId]] | None,
    ) -> None:
        self.swarm = swarm
        self._bootstrap = bootstrap
        self._silent_peers = silent
        self._seen: frozenset[str] = frozenset()
        self._view = self._shown = SwarmView(swarm, max_records)
        self._news = trio.Event()

    def view(self) -> SwarmView:
        """The swarm as known now.  A value: it does not change, ask again for a newer one."""
        self._replace(expire(self._view, trio.current_time()))
        return self._shown

    @property
    def last(self) -> SwarmView:
        """The view of the last look, some of whose records may have ended since.  For any thread."""
        return self._shown

    async def changed(self, since: SwarmView | None = None) -> None:
        """Return as soon as the view differs from `since`, by default from the present view.

        Without a change this waits without end: the caller sets the deadline.
        """
        since = self.view() if since is None else since
        await trio.lowlevel.checkpoint()
        while self.view() is since:
            await self._news.wait()

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """The addresses of that peer: from its own record, else from our configuration; empty if unknown."""
        record = self.view().get(peer)
        known = self._shown.dialled_at(record) if record else ()
        return known or self._bootstrap.get(peer, ())

    def merge(self, arrivals: Sequence[Arrival], met: Container[PeerId] = ()) -> tuple[PeerId, ...]:
        """Take in verified records; return the peers with news, in order.

        met: peers that this node has been connected to.
        """
        if not arrivals:
            return ()
        view, changed = merge(self._view, arrivals, trio.current_time(), met, self._bootstrap)
        self._replace(view)
        return tuple(changed)

    def mark_silent(self) -> None:
        """A peer has fallen silent, or answers again."""
        if self._silent_peers is not None and self._silent() != self._shown.silent:
            self._show()

    def set_seen(self, hosts: Iterable[str]) -> None:
        """The IP addresses under which others see this node: see `SwarmView.seen`."""
        if (seen := frozenset(hosts)) != self._seen:
            self._seen = seen
            self._show()

    async def expire_on_time(self) -> None:
        """Wake the tasks that wait for a change when a record ends."""
        while True:
            due = self.view().next_expiry - trio.current_time()
            await trio.sleep(min(max(due, 0.01), EXPIRY_SECONDS))

    def _replace(self, view: SwarmView) -> None:
        if view is not self._view:
            self._view = view
            self._show()

    def _silent(self) -> frozenset[PeerId]:
        return frozenset(self._silent_peers() if self._silent_peers else ()) & self._view.entries.keys()

    def _show(self) -> None:
        silent = self._silent()
        seen = self._seen
        self._shown = replace(self._view, silent=silent, seen=seen) if silent or seen else self._view
        self._news.set()
        self._news = trio.Event()
