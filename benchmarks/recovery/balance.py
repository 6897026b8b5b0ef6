"""Nodes that choose their blocks, and the time until blocks without a server are served again.

    python -m benchmarks balance --sizes 12 8 10 10 10 --record-ttl 30

Real processes.  Nodes of different sizes join one by one without --blocks.  Then, while a client
generates, the only holder of some blocks is killed.  Another node has to move, and the generation has to go
on with the tokens of an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from benchmarks.lib.processes import LocalSwarm, NodeProcess, ProcessError, local_swarm
from benchmarks.lib.results import Run
from benchmarks.recovery.watched import nothing, prompt_ids, watch
from client.config import ClientConfig
from client.swarm import Swarm, open_swarm
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

GRACE_SECONDS = 15.0  # beyond a record's life, until the blocks are served again
LOOK_SECONDS = 0.05
KILL_AT = 16  # tokens
MAX_SECONDS = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where blocks stayed uncovered or a token was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks balance")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[12, 8, 10, 10, 10], help="blocks of each node"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--record-ttl", type=float, default=90.0, help="seconds (%(default)g)")
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    common = ["--threads", str(flags.threads), "--dtype", "float32"]
    network = ["--record-ttl", str(flags.record_ttl)]
    run = Run()
    with local_swarm(common, network, {"OMP_NUM_THREADS": str(flags.threads)}) as swarm:
        try:
            swarm.start("bootstrap").wait_online()
            result = trio.run(partial(measure, flags, swarm))
        except ProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for key, value in result.items():
        print(f"  {key:28} {value}")
    run.write(flags.json, result)
    return 0 if result["ok"] else 1


async def measure(flags: argparse.Namespace, swarm: LocalSwarm) -> dict[str, Any]:
    """Joins, an undisturbed generation, a kill."""
    blocks = read_info(resolve(flags.model, cache_dir=cache_dir())).blocks
    model = [] if flags.model is None else [flags.model]
    nodes: list[NodeProcess] = []
    uncovered: list[int] = []
    for size in flags.sizes:
        nodes.append(swarm.start(*model, "--num-blocks", str(size)))
        await trio.to_thread.run_sync(nodes[-1].wait_online)
        uncovered.append(held(nodes, blocks).count(0))
    room = [max(0, blocks - sum(flags.sizes[: n + 1])) for n in range(len(nodes))]
    joined = {
        "spans_joined": [blocks_of(node) for node in nodes],
        "uncovered": uncovered,
        "no_room_for": room,
    }
    seconds = flags.record_ttl + GRACE_SECONDS
    config = ClientConfig(
        (*swarm.peers,), flags.model, threads=1, give_up_seconds=MAX_SECONDS, wait_seconds=MAX_SECONDS
    )
    async with open_swarm(config) as client:
        ids = prompt_ids(flags.model, 16)
        conversation = client.conversation(len(ids) + flags.tokens)
        whole = await watch(client, conversation, ids, flags.tokens, nothing)
        conversation.close()
        killed = await kill_the_only_holder(client, nodes, blocks, ids, flags.tokens, seconds)
    return {
        **joined,
        **{key: value for key, value in killed.items() if key != "tokens"},
        "spans_at_end": [blocks_of(node) for node in nodes if node.process.poll() is None],
        "limit_s": seconds,
        "tokens_equal": killed["tokens"] == whole.tokens,
        "ok": uncovered == room
        and killed["tokens"] == whole.tokens
        and killed["served_again_s"] is not None
        and killed["served_again_s"] <= seconds,
    }


async def kill_the_only_holder(
    client: Swarm, nodes: list[NodeProcess], blocks: int, ids: list[int], tokens: int, seconds: float
) -> dict[str, Any]:
    """A generation during which the only holder of some blocks is killed."""
    counts = held(nodes, blocks)
    alone = [node for node in nodes if 1 in {counts[block] for block in range(*blocks_of(node))}]
    if not alone:
        raise ProcessError("no node holds a block alone: choose smaller --sizes")
    victim, rest = alone[-1], [node for node in nodes if node is not alone[-1]]
    if sum(stop - start for start, stop in map(blocks_of, rest)) < blocks:
        raise ProcessError("the others have no room for all blocks: choose larger --sizes")
    found: dict[str, Any] = {"killed": blocks_of(victim), "served_again_s": None}

    async def until_served_again(killed_at: float) -> None:
        with trio.move_on_after(seconds + GRACE_SECONDS):
            while held(rest, blocks).count(0):  # noqa: ASYNC110
                await trio.sleep(LOOK_SECONDS)
            found["served_again_s"] = round(time.perf_counter() - killed_at, 2)

    conversation = client.conversation(len(ids) + tokens)
    async with trio.open_nursery() as nursery:

        async def kill(number: int) -> None:
            if number == KILL_AT:
                victim.kill()
                nursery.start_soon(until_served_again, time.perf_counter())

        watched = await watch(client, conversation, ids, tokens, kill)
    conversation.close()
    longest = max(watched.seconds[1:], default=None)
    return {**found, "longest_token_s": longest, "error": watched.error, "tokens": watched.tokens}


def blocks_of(node: NodeProcess) -> tuple[int, int]:
    """The blocks that it serves now: the ready-file is written again after a move."""
    start, stop = json.loads(node.ready_file.read_text())["blocks"]
    return start, stop


def held(nodes: Sequence[NodeProcess], blocks: int) -> list[int]:
    """The number of these nodes that serve each block."""
    spans = [blocks_of(node) for node in nodes]
    return [sum(start <= block < stop for start, stop in spans) for block in range(blocks)]
