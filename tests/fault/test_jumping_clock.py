"""A wall clock that jumps by days under nodes that serve."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.processes import LocalSwarm, local_swarm
from tests.fault.test_processes import wait_until
from tests.forked import Forked, forked_run
from tests.jumping_clock import set_clock

pytestmark = pytest.mark.process

DAY = 86_400.0
TTL_SECONDS = 6.0  # announced every two seconds


def answer(*words: object) -> dict[str, Any]:
    done = forked_run(*words)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tokens(swarm: LocalSwarm, model: Path) -> list[int]:
    """What a client gets that joins now."""
    words = ("--model", model, "--json", "--greedy", "--max-new-tokens", "8", "hello")
    found: list[int] = answer("client", "generate", "--peers", *swarm.peers, *words)["tokens"]
    return found


def states(swarm: LocalSwarm) -> dict[str, str]:
    peers = answer("node", "status", "--json", "--peers", *swarm.peers)["peers"]
    return {peer["peer"]: peer["state"] for peer in peers}


def test_a_wall_clock_that_jumps_by_a_day_costs_no_token_and_no_peer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    set_clock(clock, 0)
    wrong = ["tests.jumping_clock", str(clock)]

    def spawn(command: Sequence[str], environment: Mapping[str, str], output: Path) -> Forked:
        python, flag, *words = command
        runs = words if "3:6" in words else [*wrong, *words]  # the second node's clock is right
        return Forked([python, flag, *runs], environment, output)

    flags = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
    with local_swarm(flags, ["--record-ttl", str(TTL_SECONDS)], spawn=spawn) as swarm:
        for blocks in ("0:3", "3:6"):
            swarm.start(str(tiny_llama), "--blocks", blocks).wait_online()
        before = tokens(swarm, tiny_llama)
        online = {str(node.facts["peer_id"]): "online" for node in swarm.nodes}
        for jump in (-DAY, DAY, -DAY):
            set_clock(clock, jump)
            time.sleep(TTL_SECONDS + 1)  # the last record from before the jump has ended
            wait_until(lambda: states(swarm) == online, 30)
            assert tokens(swarm, tiny_llama) == before
        assert all(node.process.poll() is None for node in swarm.nodes)
