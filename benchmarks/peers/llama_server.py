"""llama-server and ggml-rpc-server as contenders: command lines, processes, answers."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gateway.http import HOST, get, posted
from benchmarks.lib.processes import ROOT, STOP_SECONDS, ProcessError, free_port
from benchmarks.peers.contenders import Contender, Generation, Round, Threads

READY_SECONDS = 120.0
COMPLETION = "/completion"
SLOT_GRAIN = 256  # tokens of a slot's context are rounded up to so many


@dataclass(frozen=True, slots=True)
class Need:
    """Tokens of one generation."""

    prompt: int
    new: int

    @property
    def context(self) -> int:
        """Tokens of a slot's context."""
        return -(-(self.prompt + self.new + 1) // SLOT_GRAIN) * SLOT_GRAIN


def rpc_command(program: str, port: int, threads: Threads) -> list[str]:
    """A ggml-rpc-server."""
    return [program, "--host", HOST, "--port", str(port), "--threads", str(threads.server)]


def server_command(
    program: str,
    weights: Path,
    port: int,
    row: Contender,
    threads: Threads,
    need: Need,
    rpc_ports: Sequence[int] = (),
) -> list[str]:
    """llama-server with a slot for each client; with RPC all layers are at the servers, in equal parts.

    The cache of prompts is off: each round computes its prompt anew, as the rounds of the others do.
    """
    words = [
        program, "--model", str(weights), "--host", HOST, "--port", str(port),
        "--threads", str(threads.client), "--threads-batch", str(threads.client),
        "--parallel", str(row.clients), "--ctx-size", str(row.clients * need.context),
        "--cache-ram", "0", "--fit", "off", "--no-ui",
    ]  # fmt: skip
    if rpc_ports:
        words += ["--rpc", ",".join(f"{HOST}:{port}" for port in rpc_ports)]
        words += ["--n-gpu-layers", "99", "--split-mode", "layer"]
        words += ["--tensor-split", ",".join("1" for _ in rpc_ports)]
    return words


def question(ids: Sequence[int], tokens: int) -> dict[str, Any]:  # Any: JSON
    """A greedy completion of token ids: all tokens, none out of a cache, each in an event of its own."""
    return {
        "prompt": list(ids),
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
        "response_fields": ["content", "stop"],  # of the last event, which has the whole prompt otherwise
    }


def generation_of(events: Sequence[tuple[float, bytes]]) -> Generation:
    """The answer in the lines of a stream of events, each with the seconds at which it came.

    An event may have several tokens, which then came together.  Raises ProcessError for an answer that is
    an error.
    """
    tokens: list[int] = []
    at: list[float] = []
    for seconds, line in events:
        if line.startswith((b"error:", b"data: {")):
            event = json.loads(line.partition(b":")[2])
            if "error" in event or line.startswith(b"error:"):
                raise ProcessError(f"llama-server answered {event.get('error', event)}")
            new = event.get("tokens") or []
            tokens += new
            at += [seconds] * len(new)
    if not tokens:
        raise ProcessError("llama-server's answer has no token")
    return Generation(tuple(tokens), tuple(at))


async def complete(port: int, ids: Sequence[int], tokens: int) -> Generation:
    """One answer.  Raises ProcessError."""
    events: list[tuple[float, bytes]] = []
    began = time.perf_counter()
    async with posted(port, COMPLETION, question(ids, tokens)) as (reader, _):
        status = (await reader.readline()).split()[1:2]
        async for line in reader:  # read after the last one: nothing is decoded between two tokens
            events.append((time.perf_counter() - began, line))
    if status != [b"200"]:
        raise ProcessError(f"llama-server answered {status} {b''.join(line for _, line in events)[-300:]!r}")
    return generation_of(events)


def round_of(port: int, prompts: Sequence[Sequence[int]], tokens: int, seconds: float) -> Round:
    """All prompts at one moment, answered.  Raises ProcessError, also after `seconds`."""

    async def ask() -> Round:
        began = time.perf_counter()
        async with asyncio.timeout(seconds):
            generations = await asyncio.gather(*(complete(port, ids, tokens) for ids in prompts))
        return Round(tuple(generations), time.perf_counter() - began)

    try:
        return asyncio.run(ask())
    except TimeoutError:
        raise ProcessError(f"llama-server did not answer within {seconds:.0f} s") from None
    except (OSError, IndexError) as error:
        raise ProcessError(f"llama-server is gone: {error!r}") from error


@contextmanager
def llama_contender(
    program: Callable[[str], str],
    weights: Path,
    row: Contender,
    threads: Threads,
    need: Need,
    folder: Path,
) -> Iterator[int]:
    """A llama-server that is ready, its ggml-rpc-servers with it: its port.  All end with the block.

    program: the path of a program of llama.cpp.  folder: of the logs.  Raises ProcessError.
    """
    with ExitStack() as stack:
        ports = [free_port() for _ in range(row.servers)]
        for number, port in enumerate(ports):
            command = rpc_command(program("ggml-rpc-server"), port, threads)
            log = folder / f"{row.label}-{number}.log"
            stack.enter_context(running(command, log, lambda port=port: _listens(port)))  # type: ignore[misc]
        port = free_port()
        command = server_command(program("llama-server"), weights, port, row, threads, need, ports)
        stack.enter_context(running(command, folder / f"{row.label}.log", lambda: _is_healthy(port)))
        yield port


@contextmanager
def running(
    command: Sequence[str], log: Path, is_ready: Callable[[], bool], seconds: float = READY_SECONDS
) -> Iterator[None]:
    """A process that is ready; it ends with the block.  Raises ProcessError."""
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        except OSError as error:
            raise ProcessError(f"{command[0]} does not start: {error}") from error
    try:
        deadline = time.monotonic() + seconds
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-1000:]
                raise ProcessError(f"{Path(command[0]).name} is not ready: {end}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def _is_healthy(port: int) -> bool:
    try:
        return asyncio.run(get(port, "/health"))[0] == 200
    except (OSError, IndexError, TimeoutError):
        return False
