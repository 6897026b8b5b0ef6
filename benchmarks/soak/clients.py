"""Clients of all sorts in one process: they generate, break off, train.  A worker of `benchmarks soak`."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from contextlib import aclosing

import trio

from client.config import ClientConfig
from client.swarm import Swarm, open_swarm
from node.runtime.nurseries import run
from tensor_codec.errors import PeerFault, Refused

PROMPT = "The three most important things about a good garden are"
LEAST_TOKENS, MOST_TOKENS = 2, 32
TRAINED_TOKENS = 64
TELL_SECONDS = 5.0


async def live(peers: tuple[str, ...], model: str | None, clients: int, seed: int) -> None:
    """Work until the process is killed, and print what has been done so far every few seconds."""
    done: Counter[str] = Counter()
    async with open_swarm(ClientConfig(peers, model, threads=1)) as swarm, trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(one_client, swarm, random.Random(seed + number), done)
        while True:
            print(json.dumps(done), flush=True)
            await trio.sleep(TELL_SECONDS)


async def one_client(swarm: Swarm, rng: random.Random, done: Counter[str]) -> None:
    """One thing after the other, by chance."""
    while True:
        what = rng.choice((generate, generate, break_off, cancel, train))
        try:
            await what(swarm, rng)
            done[what.__name__] += 1
        except (PeerFault, Refused) as error:
            done[f"error: {type(error).__name__}"] += 1
            await trio.sleep(0.5)


async def generate(swarm: Swarm, rng: random.Random) -> None:
    """A generation from its first token to its last."""
    count = rng.randint(LEAST_TOKENS, MOST_TOKENS)
    async for _ in swarm.generate(PROMPT * rng.randint(1, 4), max_new_tokens=count, temperature=0):
        pass


async def break_off(swarm: Swarm, rng: random.Random) -> None:
    """A generation that is left after some tokens."""
    left = rng.randint(1, LEAST_TOKENS)
    async with aclosing(swarm.generate(PROMPT, max_new_tokens=MOST_TOKENS, temperature=0)) as tokens:
        async for _ in tokens:
            left -= 1
            if not left:
                return


async def cancel(swarm: Swarm, rng: random.Random) -> None:
    """A generation that is cancelled in the midst of a token, or of its prompt."""
    with trio.move_on_after(rng.uniform(0.01, 0.5)):
        async with aclosing(swarm.generate(PROMPT * 8, max_new_tokens=MOST_TOKENS, temperature=0)) as tokens:
            async for _ in tokens:
                pass


async def train(swarm: Swarm, rng: random.Random) -> None:
    """A forward and a backward without a session."""
    import torch

    hidden = torch.randn(1, rng.randint(1, TRAINED_TOKENS), swarm.info.hidden_size)
    output, kept = await swarm.forward_kept(hidden)
    await swarm.backward(kept, output)
    kept.release()


def main() -> None:
    """Flags to `live`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    flags = parser.parse_args()
    run(lambda: live(tuple(flags.peers), flags.model, flags.clients, flags.seed))


if __name__ == "__main__":
    main()
