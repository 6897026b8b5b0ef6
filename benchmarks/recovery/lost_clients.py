"""Clients that are killed with kill -9, and their remains at the servers.

A part of `benchmarks recovery`.

Every client is a process of its own, forked from a process with all imports done.  It sends a long prompt;
half of the clients are killed during the prompt, half during decoding, some at a time.  Afterwards
descriptors are counted until they are back at their first number.  After the promised seconds one more
generation shows that all servers are alive, and the servers are asked to leave: each then reports its
number of open sessions, and its last record has its free cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import trio

from benchmarks.recovery.replicas import END_SECONDS, ReplicatedSwarm, drain
from benchmarks.recovery.watched import fresh_client, peers_in_use, prompt_ids, undisturbed, watch
from client.config import ClientConfig
from client.swarm import Swarm, open_swarm

PROMPT_TOKENS, NEW_TOKENS = 512, 64
CLIENT_SECONDS = 120.0  # for a client to reach its phase
COUNT_SECONDS = 0.1
BACK_SECONDS = 30.0  # the longest look
PROMISED_SECONDS = 5.0
SETTLE_SECONDS = 1.0  # for a client's own good-byes
LEFT_OPEN = re.compile(r"leaving, (\d+) sessions are open")
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Guest:
    """The task of a client process, and the phase of its kill, `wait` seconds after the phase begins."""

    peers: tuple[str, ...]
    model: str | None
    ids: tuple[int, ...]
    phase: Phase
    wait: float


def lost_clients(flags: argparse.Namespace, replicas: ReplicatedSwarm) -> dict[str, Any]:  # Any: JSON
    """Kill `flags.runs` clients, `flags.at_once` at a time, and count their remains.  Ends the servers."""
    ids = prompt_ids(flags.model, flags.prompt_tokens or PROMPT_TOKENS)
    result = trio.run(_watched_by_a_client, flags, replicas, ids)
    said = [LEFT_OPEN.search(replica.node.log.read_text()) for replica in replicas.replicas]
    result["sessions_left"] = [int(found[1]) if found else None for found in said]
    counts = (result["sessions_left"], result["cache_tokens_left"], result["descriptors_left"])
    nothing_left = all(left == 0 for lefts in counts for left in lefts)
    back = result["descriptors_back_s"]
    result["ok"] = nothing_left and result["alive"] and back is not None and back <= PROMISED_SECONDS
    return result


async def _watched_by_a_client(
    flags: argparse.Namespace, replicas: ReplicatedSwarm, ids: list[int]
) -> dict[str, Any]:  # Any: JSON
    async with fresh_client(flags.model, replicas) as swarm:
        free = free_tokens(swarm, replicas)
        usual = await undisturbed(swarm, ids)
        await trio.sleep(SETTLE_SECONDS)
        before = descriptors(replicas)
        guests = invite(flags, replicas.peers, ids, usual.seconds[0])
        deaths, most = await _deaths(guests, flags.at_once, replicas)
        ended = max(at for _, at in deaths)
        back = None
        while back is None and (waited := time.perf_counter() - ended) < BACK_SECONDS:
            if all(now <= then for now, then in zip(descriptors(replicas), before, strict=True)):
                back = waited
            await trio.sleep(0.02)
        left = [now - then for now, then in zip(descriptors(replicas), before, strict=True)]
        alive = (await undisturbed(swarm, ids)).tokens == usual.tokens
        rest = PROMISED_SECONDS - (time.perf_counter() - ended)
        await trio.sleep(max(rest, SETTLE_SECONDS))
        await trio.to_thread.run_sync(stop_all, replicas)
        return {
            "clients": flags.runs,
            "at_once": flags.at_once,
            "killed_in": dict(Counter(phase for phase, _ in deaths)),
            "descriptors_before": before,
            "descriptors_most": most,
            "descriptors_back_s": back,
            "descriptors_left": [max(more, 0) for more in left],
            "cache_tokens_left": [
                then - now for now, then in zip(free_tokens(swarm, replicas), free, strict=True)
            ],
            "alive": alive,
        }


async def _deaths(
    guests: Sequence[Guest], at_once: int, replicas: ReplicatedSwarm
) -> tuple[list[tuple[str, float]], list[int]]:
    """The answer of `kill_all`, and the most descriptors that each server had in the meantime."""
    most = descriptors(replicas)
    deaths: list[tuple[str, float]] = []

    async def count() -> None:
        nonlocal most
        while True:
            await trio.sleep(COUNT_SECONDS)
            most = list(map(max, most, descriptors(replicas)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        deaths = await trio.to_thread.run_sync(kill_all, guests, at_once)
        nursery.cancel_scope.cancel()
    return deaths, most


def stop_all(replicas: ReplicatedSwarm) -> None:
    """Ask all servers to leave, so that each announces its free cache once more; wait for their ends."""
    for replica in replicas.replicas:
        drain(replica)
    for replica in replicas.replicas:
        replica.node.process.wait(END_SECONDS)


def descriptors(replicas: ReplicatedSwarm) -> list[int]:
    """Open descriptors of each server."""
    return [replica.node.descriptors() for replica in replicas.replicas]


def free_tokens(swarm: Swarm, replicas: ReplicatedSwarm) -> list[int]:
    """Free cache tokens of each server in its last record; the last one is the good-bye."""
    peers = [replica.peer for replica in replicas.replicas if replica.peer is not None]
    return [swarm.view().entries[peer].record.cache_tokens for peer in peers]


def invite(flags: argparse.Namespace, peers: Sequence[str], ids: list[int], first: float) -> list[Guest]:
    """Plan half of the kills in prefill and half in decoding, each at a moment of its own."""
    rng = random.Random(flags.seed)
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    return [
        Guest(tuple(peers), flags.model, tuple(ids), phases[number % 2], rng.random() * first / 2)
        for number in range(flags.runs)
    ]


def kill_all(guests: Sequence[Guest], at_once: int) -> list[tuple[str, float]]:
    """Start and kill all of them; the phase in which each died, and when."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.recovery.lost_clients", "transformers.modeling_utils"])

    def one(guest: Guest) -> tuple[str, float]:
        ours, theirs = context.Pipe()
        process = context.Process(target=be_guest, args=(guest, theirs), daemon=True)
        process.start()
        theirs.close()
        said = ""
        while said != guest.phase:
            if not ours.poll(CLIENT_SECONDS):
                process.kill()
                return f"not in {guest.phase} in time", time.perf_counter()
            said = ours.recv()
        time.sleep(guest.wait)
        process.kill()
        killed = time.perf_counter()
        process.join()
        with suppress(EOFError):
            while ours.poll():  # it may have come further in the meantime
                said = ours.recv()
        return said, killed

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, guests))


def be_guest(guest: Guest, pipe: Connection) -> None:
    """A client process: reports its phase, and goes on until it is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    trio.run(_generate, guest, pipe)


async def _generate(guest: Guest, pipe: Connection) -> None:
    async with open_swarm(ClientConfig(guest.peers, guest.model, threads=1)) as swarm:
        conversation = swarm.conversation(len(guest.ids) + NEW_TOKENS)

        async def tell_when_open() -> None:
            while not peers_in_use(conversation):  # noqa: ASYNC110  no event tells
                await trio.sleep(0.001)
            pipe.send("prefill")

        async def before(asked: int) -> None:
            if asked == 1:
                pipe.send("decode")
            elif asked == NEW_TOKENS // 2:
                await trio.sleep_forever()  # far enough

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_when_open)
            await watch(swarm, conversation, guest.ids, NEW_TOKENS, before)
