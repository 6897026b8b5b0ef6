"""Generate text with a swarm from a plain script, or line by line in a notebook: no async, no await.

python examples/generate_sync.py --peers /ip4/.../p2p/12D3... "The capital of France is" "Water boils"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import client


def answer(swarm: client.SyncSwarm, prompt: str, max_new_tokens: int) -> None:
    """Print one prompt with its continuation, each token as it comes."""
    print(prompt, end="", flush=True)
    # Any end of the loop (a break, an error, Ctrl-C) ends the session at the servers.
    for token in swarm.generate(prompt, max_new_tokens=max_new_tokens):
        print(token.text, end="", flush=True)
    print()


def main() -> None:
    """Read the command line and generate, one prompt after the other."""
    parser = argparse.ArgumentParser(description="Generate text with a swarm.")
    parser.add_argument("prompts", nargs="*", default=["The capital of France is"])
    parser.add_argument("--peers", action="append", required=True, help="address of a node; may come again")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--model", help="the model that the swarm serves (default: the built-in one)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    flags = parser.parse_args()
    # In a notebook: swarm = client.connect_sync(...) in one cell, swarm.close() in the last.
    with client.connect_sync(flags.model, peers=flags.peers, swarm_key=flags.swarm_key) as swarm:
        for prompt in flags.prompts:
            answer(swarm, prompt, flags.max_new_tokens)


if __name__ == "__main__":
    main()
