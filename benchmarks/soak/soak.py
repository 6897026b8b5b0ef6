"""Nodes under sessions that open, run, break and close, for long: memory, descriptors, tasks and threads.

    python -m benchmarks soak --minutes 30

Real processes on the loopback: a bootstrap node, and for each half of the model a steady server and one that
is restarted again and again, by SIGTERM and by SIGKILL in turn.  Two processes of clients generate, leave,
are cancelled, and train; one of the two is killed and replaced now and then.  Every second each server says
what it holds.

Results: `servers`, a list with one entry for each steady server and for the client that stays.  Its keys are
`who`, `samples`, and for each of `rss_mib`, `descriptors`, `tasks`, `threads`: `..._first` and `..._last`,
the medians of the first and the last quarter after the warm-up, and `..._per_minute`, the slope of all of it;
`grown` names what grew by more than noise.  `done` counts what the client that stays has done, `restarts` and
`killed_clients` what was done to the others.  `ok`: nothing has grown, and every steady server runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lib.processes import ROOT, LocalSwarm, NodeProcess, ProcessError, equal_spans, local_swarm
from benchmarks.lib.results import Run
from benchmarks.soak.growth import MIB, Sample, growth
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

SAMPLE_SECONDS = 1.0
WARM_UP_SHARE = 0.2  # of the whole time, before growth is looked for


@dataclass(slots=True)
class Steady:
    """A process that is never restarted, and its samples."""

    who: str
    pid: int
    vitals: Path | None  # None: a client, whose tasks are not known
    began: float
    samples: list[Sample] = field(default_factory=list)

    def sample(self) -> None:
        """Look once; nothing where it has ended."""
        try:
            process = psutil.Process(self.pid)
            facts = {} if self.vitals is None else json.loads(self.vitals.read_text())
            self.samples.append(
                Sample(
                    time.monotonic() - self.began,
                    process.memory_info().rss / MIB,
                    process.num_fds(),
                    facts.get("tasks", 0),
                    process.num_threads(),
                )
            )
        except (psutil.Error, OSError, json.JSONDecodeError):
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where something has grown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--minutes", type=float, default=30.0, help="(%(default)g)")
    parser.add_argument("--clients", type=int, default=3, help="at a time in each process (%(default)s)")
    parser.add_argument("--restart-seconds", type=float, default=40.0, help="between restarts (%(default)g)")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="of each server (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    run = Run()
    common = ["--threads", "1", "--dtype", "float32", "--cache-tokens", str(flags.cache_tokens)]
    with local_swarm(common, (), {"OMP_NUM_THREADS": "1"}) as swarm:
        try:
            result = measure(flags, swarm)
        except ProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for row in result["servers"]:
        print(f"{row['who']}: {told(row)}")
    print({key: value for key, value in result.items() if key != "servers"})
    run.write(flags.json, result)
    return 0 if result["ok"] else 1


def told(row: dict[str, Any]) -> str:
    """One process in words."""
    parts = [
        f"{name} {row[f'{name}_first']} -> {row[f'{name}_last']} ({row[f'{name}_per_minute']:+.3f} a minute)"
        for name in ("rss_mib", "descriptors", "tasks", "threads")
    ]
    return ", ".join(parts) + (f"; GROWN: {', '.join(row['grown'])}" if row["grown"] else "")


def measure(flags: argparse.Namespace, swarm: LocalSwarm) -> dict[str, Any]:
    """The whole run.  Raises ProcessError."""
    bootstrap = swarm.start("bootstrap")
    bootstrap.wait_online()
    blocks = read_info(resolve(flags.model, cache_dir=cache_dir())).blocks
    model = [] if flags.model is None else [flags.model]
    steady, restarted = [], []
    for begin, end in equal_spans(blocks, 2):
        words = [*model, "--blocks", f"{begin}:{end}"]
        file = swarm.folder / f"vitals-{begin}.json"
        node = swarm.start(*words, "--vitals-file", str(file))
        node.wait_online()
        steady.append(
            (node, Steady(f"server of blocks {begin}:{end}", node.process.pid, file, time.monotonic()))
        )
        other = swarm.start(*words)
        other.wait_online()
        restarted.append((words, other))
    with ExitStack() as stack:
        staying = stack.enter_context(Clients.running(flags, bootstrap.address, flags.seed, swarm.folder))
        watched = [each for _, each in steady]
        watched.append(Steady("client that stays", staying.process.pid, None, time.monotonic()))
        killed = stack.enter_context(
            Clients.running(flags, bootstrap.address, flags.seed + 100, swarm.folder)
        )
        counts = disturb(flags, swarm, restarted, watched, killed)
    rows = [{"who": each.who, **growth(each.samples, 60 * flags.minutes * WARM_UP_SHARE)} for each in watched]
    alive = all(node.process.poll() is None for node, _ in steady)
    return {
        "minutes": flags.minutes,
        "servers": rows,
        "done": staying.done(),
        **counts,
        "alive": alive,
        "ok": alive and not any(row["grown"] for row in rows),
    }


def disturb(
    flags: argparse.Namespace,
    swarm: LocalSwarm,
    restarted: list[tuple[list[str], NodeProcess]],
    watched: Sequence[Steady],
    killed: Clients,
) -> dict[str, Any]:
    """Restart servers and kill clients until the time is up, and sample meanwhile.  Raises ProcessError."""
    rng = random.Random(flags.seed)
    end = time.monotonic() + 60 * flags.minutes
    due = time.monotonic() + flags.restart_seconds
    restarts = deaths = 0
    while time.monotonic() < end:
        for each in watched:
            each.sample()
        time.sleep(SAMPLE_SECONDS)
        if time.monotonic() < due:
            continue
        due = time.monotonic() + flags.restart_seconds
        words, node = restarted.pop(0)
        if restarts % 2:
            node.kill()
        else:
            node.stop()
        restarted.append((words, swarm.start(*words)))
        restarts += 1
        if rng.random() < 0.5:
            killed.start_anew()
            deaths += 1
    return {"restarts": restarts, "killed_clients": deaths}


@dataclass(slots=True)
class Clients:
    """A process of clients.  Made by `running`."""

    command: list[str]
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    @contextmanager
    def running(cls, flags: argparse.Namespace, address: str, seed: int, folder: Path) -> Iterator[Clients]:
        """The process, killed at the end of the block."""
        model = [] if flags.model is None else ["--model", flags.model]
        command = [
            sys.executable, "-m", "benchmarks.soak.clients", "--peers", address, *model,
            "--clients", str(flags.clients), "--seed", str(seed),
        ]  # fmt: skip
        log = folder / f"clients-{seed}.log"
        found = cls(command, log, cls.start(command, log))
        try:
            yield found
        finally:
            found.process.kill()
            found.process.wait()

    @staticmethod
    def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A new process with its output in the log."""
        with log.open("ab") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def start_anew(self) -> None:
        """kill -9, and another one in its place."""
        self.process.kill()
        self.process.wait()
        self.process = self.start(self.command, self.log)

    def done(self) -> dict[str, int]:
        """What it has done, by its own last word."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("{")]
        found: dict[str, int] = json.loads(lines[-1]) if lines else {}
        return found


if __name__ == "__main__":
    sys.exit(main())
