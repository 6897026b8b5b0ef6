"""A client that accounts for the time of each token, or that prefills without pause.

A worker of `benchmarks wan`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import trio
from torch import Tensor

from client.config import ClientConfig
from client.generation.conversation import Conversation
from client.generation.head_batches import HeadBatches
from client.session.repair.contracts import packs_over
from client.session.session import Session
from client.session.steps import Pending
from client.swarm import Swarm, open_swarm
from node.model.embed_and_head import EmbedAndHead
from tensor_codec.messages.contract import are_packed
from tensor_codec.messages.session import Result


async def serve_lines(flags: argparse.Namespace) -> None:
    """Connect, then answer lines of JSON on standard input."""
    config = ClientConfig(tuple(flags.peers), flags.model, threads=flags.threads, codec=flags.codec)
    async with open_swarm(config) as swarm:
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            question = json.loads(line)
            if "text" in question:
                ids = swarm.local_model.tokenizer(question["text"])["input_ids"]
                say({"ids": ids, "hidden": swarm.info.hidden_size})
            elif "bulk" in question:
                await bulk(swarm, question["bulk"])
            else:
                speculate = question.get("speculate", "off")
                say(await generate(swarm, question["ids"], question["tokens"], speculate))


def say(answer: object) -> None:
    """One line."""
    print(json.dumps(answer), flush=True)


async def bulk(swarm: Swarm, ids: list[int]) -> None:
    """Prefill this prompt in one new session after another.

    Answers {} after the first session.  Answers the next line of standard input with the number of tokens
    since then, and their time.
    """
    done, began, first = 0, time.perf_counter(), trio.Event()

    async def prefill() -> None:
        nonlocal done
        while True:
            async for _ in swarm.generate(ids, max_new_tokens=1, temperature=0):
                pass
            done += len(ids)
            first.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(prefill)
        await first.wait()
        done, began = 0, time.perf_counter()
        say({})
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.cancel_scope.cancel()
    say({"tokens": done, "seconds": time.perf_counter() - began})


async def generate(swarm: Swarm, ids: list[int], tokens: int, speculate: str) -> dict[str, Any]:
    """Greedy, in a new session: the tokens, and for each token the parts of its time.

    speculate: the option of that name; then several tokens may come out of one step, and all but the first
    of them have no `hops`.
    open_seconds: of the first token's, until the session was open.  codec: of the session.  row_bytes: of a
    token on each link, from the client on; prompt_row_bytes: of one of a prompt's.  For each token
    its `seconds`, `ends` (embedding and head), `network` (of its last step, no hop holding it) and `hops`:
    for each step that it took, [held, computing] of each hop.
    """
    watch = Watch(swarm.local_model)
    conversation = watch.watched(swarm.conversation(len(ids) + tokens), swarm)
    found: list[dict[str, Any]] = []
    try:
        async for token in swarm.generate(
            ids, max_new_tokens=tokens, temperature=0, conversation=conversation, speculate=speculate
        ):
            found.append({"id": token.id, "seconds": token.seconds, **watch.take()})
        assert conversation.session is not None
        row_bytes, prompt_row_bytes = (bytes_of_a_row(conversation.session, swarm, n) for n in (1, len(ids)))
        codec = conversation.session.route.contract.codec
    finally:
        conversation.close()
    return {
        "tokens": found,
        "open_seconds": watch.open_seconds,
        "codec": codec,
        "row_bytes": row_bytes,
        "prompt_row_bytes": prompt_row_bytes,
    }


def bytes_of_a_row(session: Session, swarm: Swarm, rows: int) -> list[int]:
    """Of the hidden states of one token of `rows`, on each link of the chain, the answer's included."""
    contract, hops = session.route.contract, session.chain.hops
    is_fast = session.terms.codec == "fast"
    packs = packs_over(swarm.routes.terms_of(hops), contract) if is_fast else [0] * len(hops)
    packed = (contract.packed_row_bytes if are_packed(rows, pack) else contract.row_bytes for pack in packs)
    return [*packed, contract.row_bytes]


class Watch:
    """Measures a conversation, in the place of its ends and its session."""

    def __init__(self, ends: EmbedAndHead) -> None:
        self.open_seconds = 0.0
        self._ends = TimedEnds(ends)
        self._network = 0.0
        self._hops: list[tuple[tuple[float, float], ...]] = []

    def watched(self, conversation: Conversation, swarm: Swarm) -> Conversation:
        """The unused conversation, with measuring parts in it."""
        conversation.local_model = cast(EmbedAndHead, self._ends)
        conversation.heads = HeadBatches(
            conversation.local_model, swarm._compute
        )  # not part of the client's API
        conversation.open_chain = self._opener(conversation.open_chain)
        return conversation

    def _opener(self, open_chain: Callable[..., Awaitable[Session]]) -> Callable[..., Awaitable[Session]]:
        async def open_watched(**options: Any) -> Session:  # Any: passed on
            began = time.perf_counter()
            session = await open_chain(**options)
            self.open_seconds = time.perf_counter() - began
            return cast(Session, WatchedSession(session, self._note))

        return open_watched

    def _note(self, session: Session) -> None:
        if session.times is not None:
            self._network = session.times.network
            self._hops.append(session.times.hops)

    def take(self) -> dict[str, Any]:
        """The measurements since the last call."""
        taken = {"ends": self._ends.seconds, "network": self._network, "hops": self._hops}
        self._ends.seconds, self._hops = 0.0, []
        return taken


class WatchedSession:
    """A session that reports every step that comes back."""

    def __init__(self, session: Session, note: Callable[[Session], None]) -> None:
        self._session = session
        self._note = note

    def __getattr__(self, name: str) -> Any:  # Any: an attribute of a session
        return getattr(self._session, name)

    async def collect(
        self, pending: Pending, *, deadline: float | None = None, until: float | None = None
    ) -> Result:
        """See Session."""
        result = await self._session.collect(pending, deadline=deadline, until=until)
        self._note(self._session)
        return result

    def measure(self, pending: Pending) -> None:
        """See Session."""
        self._session.measure(pending)
        self._note(self._session)


class TimedEnds:
    """Ends that add up their time.  seconds: of embedding and head."""

    def __init__(self, ends: EmbedAndHead) -> None:
        self._ends = ends
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:  # Any: an attribute of the ends
        return getattr(self._ends, name)

    def row_of(self, token: int) -> None:
        """`embed` is timed."""

    def embed(self, ids: Tensor, position: int) -> Tensor:
        """See Ends."""
        began = time.perf_counter()
        hidden = self._ends.embed(ids, position)
        self.seconds += time.perf_counter() - began
        return hidden

    def best_of(self, hidden: Tensor) -> int:
        """See Ends."""
        began = time.perf_counter()
        place = self._ends.best_of(hidden)
        self.seconds += time.perf_counter() - began
        return place

    def bests_of(self, hidden: Tensor) -> list[int]:
        """See Ends."""
        began = time.perf_counter()
        places = self._ends.bests_of(hidden)
        self.seconds += time.perf_counter() - began
        return places

    def head(self, hidden: Tensor, *, best_only: bool = False) -> Tensor:
        """See Ends."""
        began = time.perf_counter()
        logits = self._ends.head(hidden, best_only=best_only)
        self.seconds += time.perf_counter() - began
        return logits


def main() -> None:
    """Flags to `serve_lines`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--peers", nargs="+", required=True)
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    trio.run(serve_lines, parser.parse_args())


if __name__ == "__main__":
    main()
