"""A node near the end of its file descriptors."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from benchmarks.lib.processes import local_swarm
from tests.fault.test_processes import wait_until
from tests.forked import Forked, forked_run

pytestmark = pytest.mark.process


def test_a_node_short_of_descriptors_accepts_nobody_until_it_has_some_and_serves_on(tiny_llama: Path) -> None:
    with local_swarm(["--threads", "1", "--device", "cpu", "--cache-tokens", "1024"], spawn=Forked) as swarm:
        node = swarm.start(str(tiny_llama), "--blocks", "0:3")
        node.wait_online()
        other = swarm.start(str(tiny_llama), "--blocks", "3:6")  # connected from before
        other.wait_online()
        soft, hard = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (node.descriptors() + 2, hard))
        wait_until(lambda: "no new connection is accepted" in node.tail(), 30)
        refused = forked_run("node", "status", "--peers", node.address)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert node.process.poll() is None
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: "connections are accepted again" in node.tail(), 30)
        words = ("--model", tiny_llama, "--max-new-tokens", "4", "hello")
        done = forked_run("client", "generate", "--peers", node.address, *words)
        assert done.returncode == 0, done.stderr
