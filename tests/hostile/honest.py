"""An honest client that decodes for ever, and says when it got each token.  A worker of tests.hostile."""

from __future__ import annotations

import sys
import time

import trio

from client.config import ClientConfig
from client.swarm import Swarm, open_swarm
from node.runtime.nurseries import run
from tensor_codec.errors import PeerFault, Refused
from tests.hostile.talking import say

PROMPT = "The three most important things about a good garden are"
NEW_TOKENS = 32  # of one session: a new one begins every second or two, and chooses its chain anew


async def decode_forever(peers: tuple[str, ...]) -> None:
    """Say each token's time, and each fault that reached the caller."""
    async with open_swarm(ClientConfig(peers, threads=1)) as swarm:
        first: list[int] = []
        while True:
            try:
                time_a_search(swarm)
                first = await decode(swarm, first)
            except (PeerFault, Refused) as error:
                say(error=f"{type(error).__name__}: {error}")
                await trio.sleep(0.2)


def time_a_search(swarm: Swarm) -> None:
    """Say how long the search for a chain takes in the client's event loop.  Raises NoChain."""
    began = time.monotonic()
    swarm.routes.choose()
    say(search=[began, time.monotonic() - began])


async def decode(swarm: Swarm, first: list[int]) -> list[int]:
    """One generation.  first: the tokens of the first one, which each later one must have again."""
    tokens = []
    async for token in swarm.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0):
        say(token=time.monotonic())
        tokens.append(token.id)
    if first and tokens != first:
        say(wrong=time.monotonic())
    return first or tokens


if __name__ == "__main__":
    peers = tuple(sys.argv[1:])
    run(lambda: decode_forever(peers))
