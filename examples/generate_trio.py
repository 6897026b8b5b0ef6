"""Generate text with a swarm, under trio: several prompts at a time.

python examples/generate_trio.py --peers /ip4/.../p2p/12D3... "The capital of France is" "Water boils"
"""

from __future__ import annotations

import argparse
from contextlib import aclosing
from pathlib import Path

import trio

import client


async def generate(flags: argparse.Namespace) -> None:
    """Join the swarm once, then answer all prompts at once."""
    # Entering loads the model's embeddings and head; the swarm computes the blocks between them.
    async with (
        client.connect(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm,
        trio.open_nursery() as nursery,
    ):
        for prompt in flags.prompts:
            nursery.start_soon(answer, swarm, prompt, flags.max_new_tokens)


async def answer(swarm: client.SwarmLike, prompt: str, max_new_tokens: int) -> None:
    """Print one prompt with its continuation."""
    text = ""
    # aclosing: an early end of the loop ends the session at the servers at once.
    async with aclosing(swarm.generate(prompt, max_new_tokens=max_new_tokens)) as tokens:
        async for token in tokens:
            text += token.text  # print(token.text, end="", flush=True) would show it as it comes
    print(f"{prompt}{text}")


def main() -> None:
    """Read the command line and generate."""
    parser = argparse.ArgumentParser(description="Generate text with a swarm.")
    parser.add_argument("prompts", nargs="*", default=["The capital of France is"])
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    trio.run(generate, parser.parse_args())


if __name__ == "__main__":
    main()
