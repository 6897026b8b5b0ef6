"""A gateway in front of a swarm, next to a client without one: tokens, first tokens, cancels, a kill, a chat.

    python -m benchmarks gateway [--rounds 5] [--tokens 64] [--kills 4] [--json FILE]

Three nodes, a copy of the middle one, a gateway and a client in Python, all processes of this machine.
Rounds of the two alternate with equal prompts, which are new each time, so that no cache helps; the one
that goes first is the other one each time, and each begins when the servers have forgotten the other's
steps.  All figures are medians but for cancelled_after_s, the longest.

    share_of_direct_1, _16   tokens per second through the gateway, as a share of `swarm.generate`'s
    ttft_extra_ms            time to the first token, beyond that of `swarm.generate`; median of pairs
    cancelled_after_s        from the end of a caller's connection to the last token that a node computes
    kill_gap_s               longest pause of a stream whose server is killed
    recovery_s               longest pause of `swarm.generate` whose server is killed
    kill_gap_extra_s         what the stream's pause is longer; median of pairs
    turn_5_of_turn_1         time to the first token of a chat's fifth turn, as a share of its first's
    tokens_equal             every text through the gateway is the direct client's, after kills too
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gateway.http import Streamed, events, get, posted, stream, value
from benchmarks.lib.processes import (
    ROOT,
    LocalSwarm,
    NodeProcess,
    ProcessError,
    Worker,
    equal_spans,
    free_port,
    local_swarm,
)
from benchmarks.lib.results import Run
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve
from node.serving.executor.batcher import BatchPolicy

TEXT = (
    "Once upon a time there was a small village at the foot of a mountain, where an old clockmaker lived with"
    " his daughter. Every morning she walked along the river to the market. Story number "
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUESTIONS = (
    "Name three animals that live in the sea.",
    "Which of them is the largest?",
    "How long does it live?",
    "What does it eat?",
    "Tell me one more thing about it.",
)
BEGAN = time.monotonic()
READY_SECONDS = 120.0
WARM_TOKENS = 16
APART_SECONDS = BatchPolicy().recently_active_seconds + 0.2  # between two peers' requests
WATCH_SECONDS = 2.0  # after a cancel
KILL_AFTER = 24  # tokens of a generation, texts of a stream

D = TypeVar("D")
G = TypeVar("G")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a text differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gateway", description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--json", type=Path)
    flags, run = parser.parse_args(arguments), Run()
    with ExitStack() as stack:
        setting = stack.enter_context(set_up(flags))
        print(f"  {time.monotonic() - BEGAN:4.0f} s  four nodes and a gateway are up", file=sys.stderr)
        result = asyncio.run(measure(setting, flags))
    for name, found in result.items():
        print(f"  {name:24} {found if isinstance(found, bool) else f'{found:.4g}'}")
    run.write(flags.json, result)
    return 0 if result["tokens_equal"] else 1


@dataclass(slots=True)
class Setting:
    """The processes.  metrics: ports of the nodes' scrapes, by peer id.  prompts: made so far."""

    swarm: LocalSwarm
    direct: Worker
    port: int
    spans: Sequence[tuple[int, int]]
    model: list[str]
    nodes: dict[str, NodeProcess] = field(default_factory=dict)
    metrics: dict[str, int] = field(default_factory=dict)
    prompts: int = 0
    differing: int = 0
    direct_first: bool = True  # of the next pair

    def start(self, span: tuple[int, int]) -> None:
        """Start a node of these blocks, and wait until it is online."""
        port = free_port()
        start, stop = span
        node = self.swarm.start(*self.model, "--blocks", f"{start}:{stop}", "--metrics", f"127.0.0.1:{port}")
        node.wait_online()
        self.nodes[node.facts["peer_id"]] = node
        self.metrics[node.facts["peer_id"]] = port

    def prompt(self) -> list[int]:
        """A prompt that nobody has asked yet; its beginning differs from all others'."""
        self.prompts += 1
        ids: list[int] = self.direct.ask({"text": f"{self.prompts}. {TEXT}{self.prompts}: "})["ids"]
        return ids

    async def pair(self, direct: Callable[[], Awaitable[D]], ours: Callable[[], Awaitable[G]]) -> tuple[D, G]:
        """Both, one after the other, in the other order than the last time.

        The servers share their compute between peers that were active a moment ago: the second one would have
        its prompt computed in small parts, next to steps that do not come any more.
        """
        self.direct_first = not self.direct_first
        await asyncio.sleep(APART_SECONDS)
        if self.direct_first:
            found = await direct()
            await asyncio.sleep(APART_SECONDS)
            return found, await ours()
        other = await ours()
        await asyncio.sleep(APART_SECONDS)
        return await direct(), other

    def kill(self, peer: str) -> None:
        """Kill a node."""
        self.metrics.pop(peer)
        self.nodes.pop(peer).kill()

    def compare(self, answer: Streamed, text: str) -> None:
        """Count an answer that is not the direct client's."""
        if answer.status != 200 or answer.error is not None or answer.text != text:
            print(f"differs: {answer.status} {answer.error} {answer.text!r}, not {text!r}", file=sys.stderr)
            self.differing += 1


@contextmanager
def set_up(flags: argparse.Namespace) -> Iterator[Setting]:
    """Three nodes, a copy of the second one, a client and a gateway.  Raises ProcessError."""
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    spans = equal_spans(read_info(resolve(flags.model, cache_dir=cache_dir())).blocks, 3)
    model = [] if flags.model is None else [flags.model]
    named = [] if flags.model is None else ["--model", flags.model]
    common = ["--dtype", flags.dtype, "--threads", str(flags.threads), "--quantize", "none"]
    with local_swarm(common, environment=threads) as swarm, ExitStack() as stack:
        port = free_port()
        setting = Setting(swarm, None, port, spans, model)  # type: ignore[arg-type]  # it needs the peers first
        for span in (*spans, spans[1]):
            setting.start(span)
        client = ["--peers", *swarm.peers, "--threads", str(flags.threads)]
        setting.direct = stack.enter_context(
            closing(Worker("benchmarks.decode.client", [*named, *client], threads))
        )
        stack.enter_context(gateway([*named, *client], port, swarm.folder / "gateway.log", threads))
        yield setting


@contextmanager
def gateway(words: Sequence[str], port: int, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A gateway that is ready.  Raises ProcessError."""
    command = [sys.executable, "-m", "client", "gateway", *words, "--port", str(port), "--no-ui"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ProcessError(f"the gateway is not ready: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    """Whether /ready says so."""
    try:
        return asyncio.run(get(port, "/ready"))[0] == 200
    except OSError:
        return False


async def measure(setting: Setting, flags: argparse.Namespace) -> dict[str, Any]:
    """All figures, the keys of the module's docstring among them."""
    result: dict[str, Any] = {"tokens": flags.tokens, "tokens_16": (flags.tokens + 1) // 2}
    few = (flags.rounds + 1) // 2  # of what takes long
    for clients, rounds, tokens in ((1, flags.rounds, flags.tokens), (16, few, result["tokens_16"])):
        await rates(setting, clients, min(tokens, WARM_TOKENS))  # the first round warms up
        pairs = [await rates(setting, clients, tokens) for _ in progress(rounds, f"{clients} at a time")]
        result[f"direct_tokens_per_s_{clients}"] = statistics.median(direct for direct, _ in pairs)
        result[f"share_of_direct_{clients}"] = statistics.median(ours / direct for direct, ours in pairs)
    firsts = [await first_tokens(setting) for _ in progress(2 * flags.rounds, "first tokens")]
    result["ttft_direct_ms"] = statistics.median(direct for direct, _ in firsts) * 1e3
    result["ttft_extra_ms"] = extra(firsts) * 1e3
    result["cancelled_after_s"] = max([await cancelled_after(setting) for _ in progress(few, "cancels")])
    chats = [await turns(setting, number) for number in progress(few, "chats")]
    result["turn_1_ms"] = statistics.median(first for first, _ in chats) * 1e3
    result["turn_5_of_turn_1"] = statistics.median(fifth / first for first, fifth in chats)
    kills = [await kill(setting, flags.tokens + KILL_AFTER) for _ in progress(flags.kills, "kills")]
    if kills:
        result["kill_gap_s"] = statistics.median(gap for _, gap in kills)
        result["recovery_s"] = statistics.median(recovery for recovery, _ in kills)
        result["kill_gap_extra_s"] = extra(kills)
    return {**result, "tokens_equal": not setting.differing}


def progress(rounds: int, what: str) -> Iterator[int]:
    """The numbers of the rounds; a line about each on standard error, with the time since the start."""
    for number in range(rounds):
        print(f"  {time.monotonic() - BEGAN:4.0f} s  {what}, {number + 1} of {rounds}", file=sys.stderr)
        yield number


def extra(pairs: Sequence[tuple[float, float]]) -> float:
    """What the gateway takes more than the client in Python: the median of (direct, ours)."""
    return statistics.median(ours - direct for direct, ours in pairs)


def longest_pause(at: Sequence[float], *, since: float) -> float:
    """The longest time between two texts that came at `since` or later, in seconds."""
    return max((later - earlier for earlier, later in pairwise(at) if earlier >= since), default=0.0)


async def ask_direct(setting: Setting, prompts: list[list[int]], tokens: int) -> dict[str, Any]:  # Any: JSON
    """One round of the client in Python."""
    found: dict[str, Any] = await asyncio.to_thread(
        setting.direct.ask, {"prompts": prompts, "tokens": tokens}
    )
    return found


async def rates(setting: Setting, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of `clients` generations at a time: direct, and through the gateway."""
    prompts = [setting.prompt() for _ in range(clients)]
    direct, (answers, seconds) = await setting.pair(
        partial(ask_direct, setting, prompts, tokens), partial(ask_gateway, setting, prompts, tokens)
    )
    count = 0
    for answer, generated in zip(answers, direct["generations"], strict=True):
        setting.compare(answer, generated["text"])
        count += len(generated["tokens"])
    return count / direct["wall_seconds"], count / seconds


async def ask_gateway(
    setting: Setting, prompts: list[list[int]], tokens: int
) -> tuple[list[Streamed], float]:
    """One round through the gateway: the answers, and the seconds of all."""
    began = time.perf_counter()
    answers = await asyncio.gather(
        *(
            stream(setting.port, COMPLETIONS, prompt=prompt, max_tokens=tokens, temperature=0)
            for prompt in prompts
        )
    )
    return answers, time.perf_counter() - began


async def first_tokens(setting: Setting) -> tuple[float, float]:
    """Seconds to the first token of one new prompt: direct, and through the gateway."""
    prompts = [setting.prompt()]
    direct, (answers, _) = await setting.pair(
        partial(ask_direct, setting, prompts, 4), partial(ask_gateway, setting, prompts, 4)
    )
    return direct["generations"][0]["seconds"][0], answers[0].first


async def computed(setting: Setting) -> float:
    """Tokens that all living nodes have computed so far."""
    pages = await asyncio.gather(*(get(port, "/metrics") for port in setting.metrics.values()))
    return sum(value(page, "raceme_node_tokens_total") for _, page in pages)


async def cancelled_after(setting: Setting) -> float:
    """Seconds from the end of a caller's connection to the last token that a node computes."""
    answer, body = (
        Streamed(),
        {"prompt": setting.prompt(), "max_tokens": 512, "temperature": 0, "stream": True},
    )
    async with posted(setting.port, COMPLETIONS, body) as (reader, _):
        async for _answer in events(reader, answer, time.perf_counter()):
            if len(answer.texts) >= KILL_AFTER:
                break
    cut = time.perf_counter()
    last, before = cut, await computed(setting)
    while (now := time.perf_counter()) < cut + WATCH_SECONDS:
        if (count := await computed(setting)) != before:
            last, before = now, count
        await asyncio.sleep(0.02)
    return last - cut


async def turns(setting: Setting, number: int) -> tuple[float, float]:
    """Seconds to the first token of the first and of the fifth turn of a chat."""
    messages: list[dict[str, str]] = [
        {"role": "system", "content": f"You are guide number {number} of a museum."}
    ]
    firsts = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = await stream(setting.port, CHAT, messages=messages, max_tokens=24, temperature=0)
        if answer.status != 200 or not answer.texts:
            raise ProcessError(f"a turn was answered with {answer.status}: {answer.error}")
        firsts.append(answer.first)
        messages.append({"role": "assistant", "content": answer.text})
    return firsts[0], firsts[-1]


async def kill(setting: Setting, tokens: int) -> tuple[float, float]:
    """Kill a server of a generation, and another one of a stream: the longest pause of each."""
    prompt = setting.prompt()
    (recovery, text), (gap, answer) = await setting.pair(
        partial(asyncio.to_thread, direct_kill, setting, prompt, tokens),
        partial(gateway_kill, setting, prompt, tokens),
    )
    setting.compare(answer, text)
    return recovery, gap


def direct_kill(setting: Setting, prompt: list[int], tokens: int) -> tuple[float, str]:
    """The longest pause of `swarm.generate` after the kill, and its text."""
    found = setting.direct.ask({"prompts": [prompt], "tokens": tokens, "tell": True})
    count = 0
    while "generations" not in found:
        count += 1
        if count == KILL_AFTER:
            setting.kill(found["hops"][1])
        found = setting.direct.answer()
    setting.start(setting.spans[1])
    generated = found["generations"][0]
    return max(generated["seconds"][KILL_AFTER:]), generated["text"]


async def gateway_kill(setting: Setting, prompt: list[int], tokens: int) -> tuple[float, Streamed]:
    """The longest pause of a stream after the kill, and the stream."""
    answer, began, killed_at = Streamed(), time.perf_counter(), 0.0
    body = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "raceme": {"trace": True},
    }  # fmt: skip
    async with posted(setting.port, COMPLETIONS, body) as (reader, _):
        async for _answer in events(reader, answer, began):
            if not killed_at and len(answer.texts) >= KILL_AFTER:
                setting.kill(answer.hops[1])
                killed_at = answer.at[-1]
    await asyncio.to_thread(setting.start, setting.spans[1])
    return longest_pause(answer.at, since=killed_at), answer
