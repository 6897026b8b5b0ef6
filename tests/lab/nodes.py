"""Nodes on the hosts of a lab, by `python -m node` as it is, and clients that are driven token by token."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.lib.processes import LocalSwarm, NodeProcess, local_swarm
from benchmarks.reach.hosts import Answerer
from tests.forked import Forked
from tests.model_fixtures import VOCAB
from tests.netlab.lab import Lab

PORT = 31330
EVERYWHERE = f"/ip4/0.0.0.0/tcp/{PORT}"
EVERYWHERE6 = f"/ip6/::/tcp/{PORT}"
FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]
PROMPT_TOKENS = 12
LOOK_SECONDS = 0.05


def until(done: Callable[[], bool], seconds: float) -> float:
    """The seconds until it is so.  Fails after `seconds`."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began


class Client(Answerer):
    """A client's process: `tests.lab.asking`."""

    def __init__(self, lab: Lab, host: str, model: Path, peers: Sequence[str], *flags: str) -> None:
        """Wait until it has joined."""
        words = ["--model", str(model), "--peers", *peers, *flags]
        super().__init__(lab, host, "tests.lab.asking", words)
        assert self.hear() == "joined"

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Begin a greedy generation; nothing is asked of a server yet."""
        assert self.ask({"ids": list(ids), "tokens": tokens}) == "begun"

    def take(self, tokens: int) -> list[int]:
        """Its next tokens."""
        found: list[int] = self.ask({"take": tokens})
        return found

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """All tokens of a greedy generation."""
        self.begin(ids, tokens)
        return self.take(tokens)

    def ways(self) -> dict[str, str]:
        """For each peer with a connection in use, "direct" or "circuit"."""
        found: dict[str, str] = self.ask({"ways": True})
        return found


class LabSwarm:
    """Nodes of one swarm on the hosts of a lab.  Made by `lab_swarm`."""

    def __init__(self, lab: Lab, model: Path, swarm: LocalSwarm) -> None:
        self.lab, self.model = lab, model
        self.processes = swarm

    @property
    def peers(self) -> list[str]:
        """The first node, for --peers."""
        return self.processes.peers

    def bootstrap(
        self,
        host: str,
        *flags: str,
        listen: Sequence[str] = (EVERYWHERE,),
        peers: Sequence[str] | None = None,
    ) -> NodeProcess:
        """A bootstrap node, online."""
        words = ["bootstrap", *_listening(listen), *flags]
        node = self.processes.start(*words, peers=peers, prefix=self.lab.enter(host))
        node.wait_online()
        return node

    def serve(
        self,
        host: str,
        start: int,
        stop: int,
        *flags: str,
        listen: Sequence[str] = (EVERYWHERE,),
        peers: Sequence[str] | None = None,
    ) -> NodeProcess:
        """A server of blocks [start, stop), online."""
        node = self.start(host, start, stop, *flags, listen=listen, peers=peers)
        node.wait_online()
        return node

    def start(
        self,
        host: str,
        start: int,
        stop: int,
        *flags: str,
        listen: Sequence[str] = (EVERYWHERE,),
        peers: Sequence[str] | None = None,
    ) -> NodeProcess:
        """As `serve`, without a wait."""
        words = [str(self.model), "--blocks", f"{start}:{stop}", *_listening(listen), *flags]
        return self.processes.start(*words, peers=peers, prefix=self.lab.enter(host))

    def client(self, host: str, *flags: str, peers: Sequence[str] | None = None) -> Client:
        """A client that has joined."""
        return Client(self.lab, host, self.model, self.peers if peers is None else peers, *flags)

    def status(self, host: str, *flags: str) -> dict[str, Any]:
        """What `python -m node status --json` says on a host, by peer."""
        words = ["status", "--json", "--peers", *self.peers, *flags]
        facts = json.loads(run_on(self.lab, host, "node", *words))
        return {peer["peer"]: peer for peer in facts["peers"]}


@contextmanager
def lab_swarm(lab: Lab, model: Path, *network: str) -> Iterator[LabSwarm]:
    """All processes are killed at the end of the block.  network: flags of every node."""
    environment = {"OMP_NUM_THREADS": "1"}
    with local_swarm(FLAGS, network, environment, Forked) as swarm:
        try:
            yield LabSwarm(lab, model, swarm)
        finally:
            for node in swarm.nodes:
                node.process.kill()  # leaving takes seconds where a network is cut


def run_on(lab: Lab, host: str, *words: str, seconds: float = 60.0, code: int = 0) -> str:
    """The standard output of `python -m WORDS` on a host, after an end with this exit code."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        command = [*lab.enter(host), sys.executable, "-m", *words]
        process = Forked(command, {**os.environ, "OMP_NUM_THREADS": "1"}, output, errors)
        try:
            ended = process.wait(seconds)
        finally:
            process.kill()
        assert ended == code, errors.read_text()
        return output.read_text()


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(3, VOCAB, (tokens,), generator=generator).tolist()
    return found


@cache
def _whole(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model)


def expected(model: Path, ids: list[int], tokens: int) -> list[int]:
    """What the whole model makes of a prompt, in this process."""
    given = torch.tensor([ids])
    out = _whole(model).generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False,
    )  # fmt: skip
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def _listening(listen: Sequence[str]) -> list[str]:
    return [word for each in listen for word in ("--listen", each)]
