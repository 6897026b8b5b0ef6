"""Run a serving node from a Python program: `python -m node` as a value and a call.

    python examples/run_a_node.py                                  found a swarm
    python examples/run_a_node.py --peers /ip4/.../p2p/12D3...     join one

The node prints on standard error how others join it.  After Ctrl-C it leaves politely.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import trio

from node.config import ConfigError, NetworkConfig, NodeConfig
from node.main import serve
from node.runtime.logs import set_up_logging


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="Serve blocks of a model in a swarm.")
    parser.add_argument("model", nargs="?", help="a folder, a Hugging Face id, or nothing: the built-in one")
    parser.add_argument("--peers", action="append", default=[], help="address of a node; none: a new swarm")
    parser.add_argument("--swarm-key", type=Path, help="the key file of a private swarm")
    parser.add_argument("--num-blocks", type=int, help="how many blocks (default: as many as fit)")
    flags = parser.parse_args()

    # One frozen value holds all settings; every field has a default.
    config = NodeConfig(
        network=NetworkConfig(peers=tuple(flags.peers), swarm_key=flags.swarm_key, name="example"),
        model=flags.model,
        num_blocks=flags.num_blocks,
    )
    set_up_logging("text")
    try:
        # `serve` is an ordinary trio function: a program of yours may start it next to its own tasks.
        # It returns after SIGINT or SIGTERM.
        trio.run(serve, config)
    except* ConfigError as wrong:  # for you to fix: one clear line each
        sys.exit("\n".join(str(error) for error in wrong.exceptions))


if __name__ == "__main__":
    main()
