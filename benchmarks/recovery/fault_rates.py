"""Steps per second against the chance that a server fails in a step.  A part of `benchmarks recovery`.

In the manner of the table in Petals' paper (arXiv:2312.08361): after every step, with chance p, a
random server of the chain in use is killed with kill -9; a supervisor starts it again at once, which
takes some seconds of this machine's time.  Where no other server of the span is up and known to
the client the kill waits for one.  "restart" closes the session at every kill and begins again at the
prompt, at once: its detection of the fault costs nothing.  Both see kills drawn from one seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from benchmarks.recovery.replicas import ReplicatedSwarm, kill
from benchmarks.recovery.watched import fresh_client, peers_in_use, prompt_ids, undisturbed, watch
from client.generation.conversation import Conversation
from client.swarm import Swarm

PROMPT_TOKENS = 32


@dataclass(slots=True)
class Killer:
    """Kills a server of the chain in use with chance `rate` after each step.

    waiting: kills drawn that wait for a spare server.  kills: done.
    """

    replicas: ReplicatedSwarm
    swarm: Swarm
    rate: float
    rng: random.Random
    waiting: int = 0
    kills: int = 0

    def step(self, conversation: Conversation) -> bool:
        """After a step: whether a server was killed."""
        self.waiting += self.rng.random() < self.rate
        peers = peers_in_use(conversation)
        if not self.waiting or not peers:
            return False
        victim, view = self.replicas.of(self.rng.choice(peers)), self.swarm.view()
        if not victim.online or not any(other.known(view) for other in self.replicas.others(victim)):
            return False
        kill(victim)
        self.waiting, self.kills = self.waiting - 1, self.kills + 1
        return True


class Killed(Exception):
    """The generation must begin again."""


@dataclass(slots=True)
class Cell:
    """One figure of the table: generations of one length at one rate."""

    tokens: int
    rate: float
    restart: bool
    limit: float
    seconds: float = 0.0
    finished: int = 0
    kills: int = 0
    attempts: int = 0
    errors: list[str] = field(default_factory=list)
    found: list[list[int]] = field(default_factory=list)

    async def generate(self, swarm: Swarm, killer: Killer, ids: Sequence[int]) -> None:
        """One generation with all its restarts; given up after `limit` seconds."""
        began = time.perf_counter()
        tokens = None
        with trio.move_on_after(self.limit):
            while tokens is None:
                self.attempts += 1
                tokens = await self._attempt(swarm, killer, ids)
        self.seconds += time.perf_counter() - began
        self.kills += killer.kills
        if tokens is not None and len(tokens) == self.tokens:
            self.finished += 1
            self.found.append(tokens)

    async def _attempt(self, swarm: Swarm, killer: Killer, ids: Sequence[int]) -> list[int] | None:
        conversation = swarm.conversation(len(ids) + self.tokens)

        async def before(asked: int) -> None:
            if asked and killer.step(conversation) and self.restart:
                raise Killed

        try:
            watched = await watch(swarm, conversation, ids, self.tokens, before)
        except Killed:
            return None
        finally:
            conversation.close()
        if watched.error is not None:
            self.errors.append(watched.error)
        return watched.tokens

    @property
    def steps_per_s(self) -> float:
        """Tokens of finished generations over the time of all."""
        return self.finished * self.tokens / self.seconds

    def row(self, runs: int) -> dict[str, Any]:  # Any: JSON
        """The figures."""
        return {
            "tokens": self.tokens,
            "fault_rate": self.rate,
            "method": "restart" if self.restart else "ours",
            "steps_per_s": self.steps_per_s,
            "finished": self.finished,
            "runs": runs,
            "attempts": self.attempts,
            "kills": self.kills,
            "seconds": self.seconds,
            "errors": self.errors,
        }


async def fault_rates(flags: argparse.Namespace, replicas: ReplicatedSwarm) -> dict[str, Any]:  # Any: JSON
    """Fill the table.  Without faults both methods are one, measured once."""
    ids = prompt_ids(flags.model, flags.prompt_tokens or PROMPT_TOKENS)
    rows: list[dict[str, Any]] = []
    equal = True
    for tokens in flags.tokens:
        expected: list[int] | None = None
        for rate in sorted({0.0, *flags.fault_rate}):
            for restart in (False, True) if rate else (False,):
                cell = Cell(tokens, rate, restart, flags.limit)
                await fill(cell, flags, replicas, ids)
                expected = expected or (cell.found[0] if cell.found else None)
                equal = equal and all(found == expected for found in cell.found)
                rows.append(cell.row(flags.runs))
                print(rows[-1], file=sys.stderr)
    lost = any(row["errors"] or (row["method"] == "ours" and row["finished"] < row["runs"]) for row in rows)
    return {
        "servers": flags.servers,
        "copies": flags.copies,
        "kills_are": "kill -9, restarted at once",
        "tokens_equal": equal,
        "ok": equal and not lost,
        "rows": rows,
    }


async def fill(cell: Cell, flags: argparse.Namespace, replicas: ReplicatedSwarm, ids: list[int]) -> None:
    """All runs of a cell, with a client of their own."""
    async with fresh_client(flags.model, replicas) as swarm:
        swarm.local_model.eos_ids = frozenset()  # the model's end token would end a long generation early
        await undisturbed(swarm, ids)
        with replicas.supervised():
            for run in range(flags.runs):
                rng = random.Random(f"{flags.seed} {cell.tokens} {cell.rate} {run}")
                await cell.generate(swarm, Killer(replicas, swarm, cell.rate, rng), ids)
    await trio.to_thread.run_sync(replicas.mend)
