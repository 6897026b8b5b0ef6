"""The output of `python -m node status`: a swarm's peers, their blocks and rates."""

from __future__ import annotations

import json
import shlex
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, TYPE_CHECKING, Any, cast

import trio

from node.config import NetworkConfig
from node.network.peer_info import QuestionStream, ask_for_info
from node.runtime.console import OutputText, one_line, put_line
from routing.names import PeerId
from routing.view.description import MAX_ASKED, UNREACHABLE, describe, worth_asking
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.messages.info import INFO_PROTOCOL

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from node.main import Node

MAX_NAMED = 4  # peers of a bottleneck
ASKED_AT_ONCE = 16  # servers that `status` asks for their state
ASK_SECONDS = 2.5  # for the answers; a little longer than the timeout of one ping
PIPE_COLUMNS = 160
MIN_COLUMNS = 20  # fewer are a wrong COLUMNS
SETTLE_SECONDS = 0.3  # after the first digest, for records on their way


async def show_status(config: NetworkConfig, *, as_json: bool, chains: int = 0, ask: bool = False) -> None:
    """Look at the swarm once and print it, with the `chains` best chains.  Raises ConfigError.

    ask: servers say their state of this moment.
    """
    from node.main import open_node

    async with open_node(config, "client") as node:
        await trio.sleep(SETTLE_SECONDS)
        await node.directory.measure(worth_asking(node.directory.view(), node.host.peer_id), ASK_SECONDS)
        facts = describe(node.directory.view(), node.directory.rtts(), chains, direct=direct_peers(node))
        if ask:
            await ask_servers(partial(node.open_stream, protocol=INFO_PROTOCOL), facts["peers"])
    if as_json:
        put_line(json.dumps(facts, indent=2))
    else:
        print_status(facts)
        put_line(page_of(config))


def direct_peers(node: Node) -> set[PeerId]:
    """The peers with a connection that goes through no relay."""
    connections = node.host.connections
    return {peer for peer in connections.connected() if connections.live(peer, direct=True) is not None}


def page_of(config: NetworkConfig) -> str:
    """One line: the command that shows this swarm live, in a browser."""
    key = "" if config.swarm_key is None else f" --swarm-key {shlex.quote(str(config.swarm_key))}"
    peers = " ".join(map(shlex.quote, config.peers[:1]))
    return one_line(f"see it live: python -m client gateway --peers {peers}{key}")


async def ask_servers(
    open_stream: Callable[[PeerId], Awaitable[QuestionStream]],
    peers: Sequence[dict[str, Any]],  # Any: JSON
) -> None:
    """Ask up to MAX_ASKED servers for their state, and put it in the place of their records' in `peers`.

    Adds `sessions` and `threads`, None where no answer came within ASK_SECONDS: then the record stands.
    """
    limiter = trio.CapacityLimiter(ASKED_AT_ONCE)

    async def ask(peer: dict[str, Any]) -> None:  # Any: JSON
        async with limiter:
            with trio.move_on_after(ASK_SECONDS), suppress(PeerFault, Refused):
                info = await ask_for_info(await open_stream(peer["peer"]), ASK_SECONDS)
                peer |= {
                    "sessions": info.sessions,
                    "free_cache_tokens": info.cache_tokens,
                    "queue": info.queue,
                    "threads": info.threads or None,  # older versions do not say
                }

    servers = [peer for peer in peers if peer["blocks"] is not None]
    async with trio.open_nursery() as nursery:
        for peer in servers:
            peer["sessions"] = peer["threads"] = None
        for peer in [peer for peer in servers if peer["state"] in ("online", "draining")][:MAX_ASKED]:
            nursery.start_soon(ask, peer)


def print_status(facts: dict[str, Any]) -> None:  # Any: JSON
    """Print the facts as a table and lines."""
    console = wide_console()
    for part in tables(facts):
        console.print(part, soft_wrap=isinstance(part, str))


def wide_console() -> Console:
    """Standard output; a file, a pipe or a terminal without a width takes lines of any length."""
    from rich.console import Console

    output = cast("IO[str]", OutputText())
    plain = partial(Console, file=output, highlight=False, markup=False, emoji=False)
    console = plain()
    return console if console.is_terminal and console.width >= MIN_COLUMNS else plain(width=PIPE_COLUMNS)


def tables(facts: dict[str, Any]) -> list[Table | str]:  # Any: JSON
    """The facts as a table and lines for rich, in their order."""
    from rich.table import Table

    servers = ", ".join(f"{count} {state}" for state, count in facts["servers"].items() if count)
    title = f"swarm {one_line(facts['swarm'])}: {servers or 'no servers'}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for column in ("peer", "name", "state", "blocks", "dtype", "reach"):
        table.add_column(column, no_wrap=True)
    for column in ("ms/block", "prefill/s", "cache", "queue", "rtt ms"):
        table.add_column(column, justify="right", no_wrap=True)
    asked = any("sessions" in peer for peer in facts["peers"])
    if asked:
        table.add_column("sessions", justify="right", no_wrap=True)
        table.add_column("threads", justify="right", no_wrap=True)
    for peer in sorted(facts["peers"], key=lambda peer: (peer["model"], peer["blocks"] or [])):
        serves = peer["blocks"] is not None
        measured = serves and peer["decode_ms_per_block"] > 0
        table.add_row(
            "…" + peer["peer"][-6:],
            one_line(peer["name"]),
            _state(peer) if serves or peer["state"] == UNREACHABLE else peer["role"],
            _blocks(peer) if serves else "",
            one_line(peer["dtype"] + f" {peer['quantize']}" * (serves and peer["quantize"] != "none")),
            _reach(peer),
            f"{peer['decode_ms_per_block']:.2f}" if measured else "",
            f"{peer['prefill_tokens_per_s']:.0f}" if measured else "",
            str(peer["free_cache_tokens"]) if measured else "",
            str(peer["queue"]) if measured else "",
            "?" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.2f}",
            *([_said(peer, "sessions"), _said(peer, "threads")] if asked else []),
        )
    parts: list[Table | str] = [table]
    if not facts["models"]:
        parts.append("no peer serves a model")
    for model in facts["models"]:
        runs = ", ".join(f"{start}:{stop}" for start, stop in model["holes"])
        state = f"served by nobody: blocks {runs}" if runs else "every block is served"
        name = one_line(f"{model['model']} ({model['revision']})")
        parts.append(f"{name}, {model['blocks']} blocks: {state}")
        if model["unreachable"]:
            parts.append(f"  no answer from {_named(model['unreachable'])}: not counted")
        parts.append(f"  servers of each block: {_runs(model['coverage'])}")
        if model["relayed"]:
            parts.append(_relayed(model))
        if model["complete"]:
            parts.append(_what_if(model))
        parts.append(_limit(model))
        parts += _chain_lines(model.get("chains", []))
    return parts


def _reach(peer: dict[str, Any]) -> str:  # Any: JSON
    """How a peer is reached: "public", "v6", "punch", "via …3KVD8B", "no: timed out"; empty where unknown.

    By its own record; punched it was from here.
    """
    if peer["punched"]:
        return "punch"
    if peer["reach"] == "relayed":
        return "via " + ", ".join("…" + relay[-6:] for relay in peer["relays"][:1])
    if peer["reach"] == "public" and all(text.startswith("/ip6/") for text in peer["addresses"]):
        return "v6"
    no = f"no: {peer['unreached']}" if peer["unreached"] else "no"
    return {"public": "public", "none": no}.get(peer["reach"], "")


def _relayed(model: dict[str, Any]) -> str:  # Any: JSON
    """One line: how many servers are reached through relays, and the blocks that nobody else has."""
    runs = ", ".join(f"{start}:{stop}" for start, stop in model["relayed_blocks"])
    count, all_of_them = len(model["relayed"]), model["reached"]
    line = (
        f"  {count} of {all_of_them} server{'s' * (all_of_them != 1)} {'is' if count == 1 else 'are'} relayed"
    )
    return line + (f"; blocks {runs} only by relayed ones" if runs else "")


def _said(peer: dict[str, Any], key: str) -> str:  # Any: JSON
    """A number that a server has said when it was asked; empty without an answer."""
    found = peer.get(key)
    return "" if found is None else str(found)


def _state(peer: dict[str, Any]) -> str:  # Any: JSON
    """Of a silent peer that is watched, for how long too."""
    seconds = peer.get("silent_s")
    return peer["state"] if seconds is None else f"{peer['state']} {seconds:.0f} s"


def _blocks(peer: dict[str, Any]) -> str:  # Any: JSON
    """ "20:30", and "20:30 -> 24:34" of one that moves."""
    spans = (peer["blocks"], peer["next_blocks"])
    return " -> ".join(f"{start}:{stop}" for start, stop in filter(None, spans))


def _what_if(model: dict[str, Any]) -> str:  # Any: JSON
    """One line: the blocks that the loss of one server would leave unserved."""
    alone = [block for block, count in enumerate(model["coverage"]) if count == 1]
    if model["survives_any_loss"]:
        return "  without any one of the servers every block would still be served"
    runs = ", ".join(f"{start}:{stop}" for start, stop in _blocks_as_runs(alone))
    return f"  served by one server only: blocks {runs}"


def _chain_lines(chains: Sequence[dict[str, Any]]) -> list[str]:  # Any: JSON
    """Chains, each with the servers that it shares with earlier chains."""
    lines, used = [], set[str]()
    for number, chain in enumerate(chains, 1):
        peers = [hop["peer"] for hop in chain["hops"]]
        shown = ", ".join(
            f"…{hop['peer'][-6:]} {hop['blocks'][0]}:{hop['blocks'][1]}{' (again)' * (hop['peer'] in used)}"
            for hop in chain["hops"]
        )
        lines.append(f"  chain {number}, {chain['expected_ms_per_token']:.1f} ms a token from here: {shown}")
        used.update(peers)
    return lines


def _limit(model: dict[str, Any]) -> str:  # Any: JSON
    """One line: the throughput of the swarm, its bound and its bottleneck."""
    capacity, most = model["capacity_tokens_per_s"], model["bound_tokens_per_s"]
    line = f"  capacity {capacity:.1f} of at most {most:.1f} tokens/s"
    if not capacity:
        return line
    everybody = len(model["bottleneck_blocks"]) == model["blocks"]
    runs = ", ".join(f"{a}:{b}" for a, b in _blocks_as_runs(model["bottleneck_blocks"]))
    return f"{line}, limited by " + (
        "all servers together" if everybody else f"blocks {runs} ({_named(model['bottleneck_peers'])})"
    )


def _named(peers: Sequence[str]) -> str:
    """The first of them, and the number of the others."""
    more = len(peers) - MAX_NAMED
    return ", ".join("…" + peer[-6:] for peer in peers[:MAX_NAMED]) + f" and {more} more" * (more > 0)


def _blocks_as_runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block:
            runs[-1] = runs[-1][0], block + 1
        else:
            runs.append((block, block + 1))
    return runs


def _runs(counts: Sequence[int]) -> str:
    """Counts per block, equal neighbours together: "0:10 x1, 10:20 x2"."""
    parts, begin = [], 0
    for block in range(1, len(counts) + 1):
        if block == len(counts) or counts[block] != counts[begin]:
            parts.append(f"{begin}:{block} x{counts[begin]}")
            begin = block
    return ", ".join(parts)
