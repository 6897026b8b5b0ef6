"""A client with one or more generations at a time.  A worker of `benchmarks decode`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

import psutil
import trio

from client.config import ClientConfig
from client.generation.generate import Token
from client.swarm import Swarm, open_swarm
from node.network.transport.link import SocketLink


class OwnTime:
    """The client's own part of each token: from an answer's bytes to those of the next step, less the head.

    Means something where one generation is under way.  seconds: of the tokens since the last `take`.
    away: from the call that sends a step's bytes to the next bytes in, of the last token.
    """

    def __init__(self, ends: Any, link: Any = SocketLink) -> None:  # Any: their methods are replaced
        self._seconds: list[float] = []
        self._received: float | None = None
        self._head = 0.0
        self._sent: float | None = None
        self.away: float | None = None
        receive, send, best_of = link.receive_into, link.send_now, ends.best_of

        async def receive_into(one: Any, buffer: memoryview) -> int:
            size: int = await receive(one, buffer)
            self._received, self._head = time.perf_counter(), 0.0
            if self._sent is not None:
                self.away, self._sent = self._received - self._sent, None
            return size

        def send_now(one: Any, data: memoryview) -> int:
            self._sent = time.perf_counter()  # before: the next process may run before this one goes on
            size: int = send(one, data)
            if self._received is not None and self._head:
                self._seconds.append(time.perf_counter() - self._received - self._head)
            self._received = None
            return size

        def timed(hidden: Any) -> int:
            began = time.perf_counter()
            place: int = best_of(hidden)
            self._head += time.perf_counter() - began
            return place

        link.receive_into, link.send_now, ends.best_of = receive_into, send_now, timed

    def take(self) -> list[float]:
        """The seconds of each token, once."""
        taken, self._seconds = self._seconds, []
        return taken


async def serve_lines(flags: argparse.Namespace) -> None:
    """Connect, then answer lines of JSON on standard input."""
    config = ClientConfig(tuple(flags.peers), flags.model, threads=flags.threads, codec=flags.codec)
    async with open_swarm(config) as swarm:
        tokens: AsyncGenerator[Token, None] | None = None
        own = OwnTime(swarm.local_model)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            question = json.loads(line)
            if "step" not in question:
                own.take()
                print(json.dumps({**await answer(swarm, question, own), "own": own.take()}), flush=True)
                continue
            if question["step"] == 0:  # one token at a time, in turn with the reference's
                tokens = swarm.generate(
                    question["ids"], max_new_tokens=question["tokens"], temperature=0, speculate="off"
                )
            assert tokens is not None
            began = time.perf_counter()
            token = await anext(tokens)
            print(json.dumps([token.id, time.perf_counter() - began]), flush=True)


async def answer(swarm: Swarm, question: dict[str, Any], own: OwnTime) -> dict[str, Any]:
    """One round: every client generates, from its own prompt; or the token ids of a text."""
    if "text" in question:
        return {"ids": swarm.local_model.tokenizer(question["text"])["input_ids"]}
    prompts = question["prompts"]
    results: list[dict[str, Any]] = [{} for _ in prompts]
    host = swarm._host  # the counters are not part of the client's API
    bytes_before, cpu_before = host.traffic.sent + host.traffic.received, _cpu()
    began = time.perf_counter()

    async def one(index: int) -> None:
        tell, speculate = bool(question.get("tell")), question.get("speculate", "off")
        results[index] = await generate(
            swarm, prompts[index], question["tokens"], own, speculate=speculate, tell=tell
        )

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(one, index)
    return {
        "generations": results,
        "wall_seconds": time.perf_counter() - began,
        "bytes": host.traffic.sent + host.traffic.received - bytes_before,
        "cpu_seconds": _cpu() - cpu_before,
    }


async def generate(
    swarm: Swarm,
    ids: list[int],
    tokens: int,
    own: OwnTime,
    *,
    speculate: str = "off",
    tell: bool = False,
) -> dict[str, Any]:
    """Generate greedily; the token ids, the seconds of each, and their part outside the hops' computing.

    hop_seconds: of each token, from the client's socket back to it, less the hops' computing, for each hop.
    speculate: the option of that name.
    tell: print the peers of the chain with each token, so that somebody may kill one of them.
    """
    seconds: list[float] = []
    outside: list[float] = []
    hops: list[float] = []
    found: list[int] = []
    text = ""
    conversation = swarm.conversation(len(ids) + tokens)
    async for token in swarm.generate(
        ids, max_new_tokens=tokens, temperature=0, conversation=conversation, speculate=speculate
    ):
        seconds.append(token.seconds)
        found.append(token.id)
        text += token.text
        if tell and conversation.session is not None:
            print(json.dumps({"hops": [hop.peer for hop in conversation.session.chain.hops]}), flush=True)
        if conversation.session is not None and (times := conversation.session.times) is not None:
            computing = sum(computed for _, computed in times.hops)
            outside.append(times.total - computing)
            if own.away is not None:
                hops.append((own.away - computing) / len(times.hops))
    conversation.close()
    return {
        "tokens": found,
        "text": text,
        "seconds": seconds,
        "outside_compute": outside,
        "hop_seconds": hops,
    }


def _cpu() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Flags to `serve_lines`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--peers", nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--codec", default="auto")
    trio.run(serve_lines, parser.parse_args())


if __name__ == "__main__":
    main()
