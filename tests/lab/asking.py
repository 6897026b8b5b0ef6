"""A client that asks for as many tokens as it is told, on a host of a lab: lines of JSON in and out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import trio

from client.config import ClientConfig
from client.swarm import open_swarm

WAIT_SECONDS = 60.0


async def serve_lines(config: ClientConfig) -> None:
    async with open_swarm(config) as swarm:
        say("joined")
        tokens = None
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = json.loads(line)
            if "ids" in order:
                if tokens is not None:
                    await tokens.aclose()
                tokens = swarm.generate(
                    order["ids"],
                    max_new_tokens=order["tokens"],
                    min_new_tokens=order["tokens"],
                    temperature=0,
                )
                say("begun")
            elif "take" in order:
                say([(await anext(tokens)).id for _ in range(order["take"])])
            else:
                connections = swarm._host.connections
                say({peer: way(connections.live(peer)) for peer in connections.connected()})


def way(connection) -> str:
    return "direct" if connection.relayed_by is None else "circuit"


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--peers", nargs="+", required=True)
    parser.add_argument("--swarm-key", type=Path)
    flags = parser.parse_args()
    trio.run(
        serve_lines,
        ClientConfig(
            tuple(flags.peers), flags.model, swarm_key=flags.swarm_key, threads=1, wait_seconds=WAIT_SECONDS
        ),
    )
