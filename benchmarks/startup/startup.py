"""The time until a node is online, and until an early client has its first token.

    python -m benchmarks startup
    python -m benchmarks startup --black-holed 1

The model must be in the cache.  Nodes start one after the other; the client starts while the last
third of the model is still missing, with a time to wait.  Then all nodes start at one moment, with kernels
compiled before and with an empty cache of kernels.

With --black-holed the swarm is complete, and new clients come one after the other, alternately without and
with further servers.  The further servers have records, claim the speed of the fastest, and answer nothing.
The difference is their cost to the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lib.processes import ROOT, ProcessError, Worker, equal_spans, local_swarm
from benchmarks.lib.results import Run
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

KINDS = ("", "_beside_black_holed")
FIGURES = ("first_token", "chain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--servers", type=int, default=3, help="of the swarm that the client waits for")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--black-holed", type=int, default=0, metavar="N", help="servers that answer nothing")
    parser.add_argument("--clients", type=int, default=7, help="with --black-holed, of each kind")
    flags = parser.parse_args(arguments)
    model = [] if flags.model is None else [flags.model]
    blocks = read_info(resolve(flags.model, cache_dir=cache_dir())).blocks
    if flags.black_holed:
        return beside_black_holes(flags, model, blocks)
    run = Run()
    runs = [one_run(flags, model, blocks) for _ in range(flags.runs)]
    result = {key: median(one[key] for one in runs) for key in runs[0]} | {"runs": runs}
    for key, value in result.items():
        if key != "runs":
            print(f"  {key:40} {value:.3f}")
    run.write(flags.json, result)
    return 0


def one_run(flags: argparse.Namespace, model: list[str], blocks: int) -> dict[str, float]:
    """A node alone, then a swarm with a client that starts before its last node."""
    common = ["--dtype", flags.dtype, "--threads", str(flags.threads)]
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    *most, last = equal_spans(blocks, flags.servers)
    with local_swarm(common, environment=threads) as swarm:
        swarm.start_spans(most[:1], *model)
        alone, cpu = swarm.nodes[0].online_seconds or 0.0, swarm.nodes[0].cpu_seconds()
        swarm.start_spans(most[1:], *model)
        waiting = start_client(flags, swarm.peers)
        node = swarm.start(*model, "--blocks", f"{last[0]}:{last[1]}")
        node.wait_online()
        first, _ = waiting.communicate(timeout=120)
        if waiting.returncode:
            raise ProcessError(f"the client ended with exit code {waiting.returncode}")
        answer: dict[str, Any] = json.loads(first)
        online = node.ready_file.stat().st_mtime
        found = {
            "node_alone_online_s": alone,
            "node_alone_cpu_s": cpu,
            "last_node_online_s": node.online_seconds or 0.0,
            "first_token_after_last_node_online_s": answer["first_token_at"] - online,
        }
    found["at_once_online_s"] = at_once(common, model, [*most, last], threads)
    with tempfile.TemporaryDirectory() as empty:
        cold = {**threads, "NUMBA_CACHE_DIR": empty}
        found["at_once_cold_online_s"] = at_once(common, model, [*most, last], cold)
    return found


def at_once(
    common: Sequence[str], model: Sequence[str], spans: Sequence[tuple[int, int]], environment: dict[str, str]
) -> float:
    """Seconds until the last one of nodes that start at one moment is online, each in a swarm of its own."""
    with local_swarm(common, environment=environment) as swarm:
        for start, stop in spans:
            swarm.start(*model, "--blocks", f"{start}:{stop}", peers=())
        for node in swarm.nodes:
            node.wait_online()
        return max(node.online_seconds or 0.0 for node in swarm.nodes)


def start_client(flags: argparse.Namespace, peers: Sequence[str]) -> subprocess.Popen[str]:
    """A client that waits; returns after the client has reported its wait."""
    code = "from benchmarks.startup.startup import wait_for_first_token; wait_for_first_token()"
    command = [sys.executable, "-c", code, json.dumps([flags.model, list(peers), flags.threads])]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not process.stdout.readline().startswith("waiting"):
        raise ProcessError("the client ended before it waited")
    return process


def beside_black_holes(flags: argparse.Namespace, model: list[str], blocks: int) -> int:
    """First tokens of new clients, in turn without and with servers that answer nothing."""
    run = Run()
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    seconds: dict[str, list[float]] = {f"{what}{kind}_s": [] for kind in KINDS for what in FIGURES}
    with local_swarm(["--dtype", flags.dtype, "--threads", str(flags.threads)], environment=threads) as swarm:
        swarm.start_spans(equal_spans(blocks, flags.servers), *model)
        holes = Worker(
            "benchmarks.startup.black_hole", [json.dumps([swarm.peers, flags.black_holed])], threads
        )
        client = Worker("benchmarks.startup.client", [], threads)
        try:
            for number in range(2 * flags.clients + 2):  # the first of each kind only warms up
                kind = KINDS[number % 2]
                holes.ask(None) if number else None
                answer = client.ask([flags.model, swarm.peers, flags.threads])
                there = flags.servers + number % 2 * flags.black_holed
                if answer["servers"] != there:
                    raise ProcessError(f"the client saw {answer['servers']} servers, {there} are announced")
                if number >= 2:
                    for what in FIGURES:
                        seconds[f"{what}{kind}_s"].append(answer[f"{what}_s"])
        finally:
            client.close()
            holes.close()
    medians = {name: median(values) for name, values in seconds.items()}
    more = {
        f"{what}_more_ms": (medians[f"{what}{KINDS[1]}_s"] - medians[f"{what}_s"]) * 1e3 for what in FIGURES
    }
    for name, value in {**medians, **more}.items():
        print(f"  {name:40} {value:.3f}")
    setting = {"black_holed": flags.black_holed, "servers": flags.servers, "clients": flags.clients}
    run.write(flags.json, {**setting, **medians, **more, "runs": seconds})
    return 0


def wait_for_first_token() -> None:
    """The client's process: ask at once, print the time of the first token."""
    import trio

    from client.connect import connect

    model, peers, threads = json.loads(sys.argv[1])

    async def ask() -> None:
        async with connect(model, peers=peers, threads=threads, wait_seconds=120) as swarm:
            print("waiting", flush=True)
            async for _ in swarm.generate("Once upon a time", max_new_tokens=2, temperature=0):
                print(json.dumps({"first_token_at": time.time()}), flush=True)
                break

    trio.run(ask)
