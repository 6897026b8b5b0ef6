"""The command-line options that every client has: the swarm, its model, and the servers that may be used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from node.config import DEFAULT_MODEL, DTYPE_CHOICES
from node.runtime.arguments import Parser, add_max_disk, add_ways_in, devices, positive, threads
from routing.chains.alternatives import Constraints
from tensor_codec.messages.contract import CODEC_CHOICES
from tensor_codec.span_spec import DTYPES, QUANTIZE


def add_swarm(parser: Parser) -> None:
    """Add the options of joining."""
    add_ways_in(parser)
    parser.add_argument("--swarm-key", type=Path, metavar="FILE", help="the key of a private swarm")
    parser.add_argument(
        "--model", help=f"a folder, a Hugging Face id, or a built-in name (default: {DEFAULT_MODEL})"
    )
    add_max_disk(parser)
    half = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument(
        "--threads", type=threads, default=half, metavar="N", help=f"threads of torch (default: {half})"
    )
    parser.add_argument(
        "--device",
        type=devices,
        default="cpu",
        metavar="DEVICE",
        help="where embedding and head compute: cpu, cuda, cuda:1 for a second GPU, mps, auto; of a list the"
        " first (default: cpu)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="what they compute in (auto: float32 on the CPU, else bfloat16 where the hardware has it)",
    )


def add_servers(parser: argparse.ArgumentParser) -> None:
    """Add the options of sessions: their length, their servers, the codec."""
    parser.add_argument(
        "--max-session-tokens", type=positive, metavar="N",
        help="the longest session to open (default: as model and swarm allow)",
    )  # fmt: skip
    servers = parser.add_argument_group("servers", "Which servers may be used, as replacements too.")
    servers.add_argument(
        "--allow-peer", action="append", metavar="ID", help="only this peer; may be given again"
    )
    servers.add_argument("--block-peer", action="append", default=[], metavar="ID", help="never this peer")
    servers.add_argument(
        "--server-dtype", action="append", choices=DTYPES, help="only servers that compute in this"
    )
    servers.add_argument(
        "--server-quantize",
        action="append",
        choices=QUANTIZE,
        help="only servers with matrices like this",
    )
    servers.add_argument("--max-hops", type=int, metavar="N", help="the most servers of one chain")
    servers.add_argument(
        "--standby",
        action="store_true",
        help="let a second server follow each one of the chain: a server's death costs no replay",
    )
    parser.add_argument(
        "--codec",
        choices=CODEC_CHOICES,
        default="auto",
        help="hidden states on the wire; auto and exact lose nothing; fast may send prompts in 8 bits a value"
        " over slow links, where the servers read them",
    )


def constraints_of(flags: argparse.Namespace) -> Constraints:
    """The constraints that the options of `add_servers` say."""
    return Constraints(
        allowed=flags.allow_peer,
        blocked=flags.block_peer,
        dtypes=flags.server_dtype,
        quantize=flags.server_quantize,
        most_hops=flags.max_hops,
    )
