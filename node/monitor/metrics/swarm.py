"""The swarm's metrics, out of its description as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from node.monitor.metrics import families as of
from node.monitor.metrics.families import Sheet, short, text

MAX_MODELS = 16  # of a swarm; a private one has one or two
MAX_PEERS = 256  # with series of their own
MAX_NAME = 32


def put_swarm(sheet: Sheet, facts: Mapping[str, Any]) -> None:  # Any: JSON
    """Servers by state, and for each model its coverage and its capacity.

    facts: see `routing.view.description.describe`.
    """
    for state in of.SWARM_STATES:
        sheet.put(of.SWARM_SERVERS, facts["servers"].get(state, 0), state=state)
    for model in facts["models"][:MAX_MODELS]:
        labels = {"model": text(model["model"]), "revision": text(model["revision"])}
        sheet.put(of.SWARM_BLOCK_MIN, min(model["coverage"], default=0), **labels)
        sheet.put(of.SWARM_MISSING, sum(stop - start for start, stop in model["holes"]), **labels)
        sheet.put(of.SWARM_CAPACITY, model["capacity_tokens_per_s"], **labels)
        sheet.put(of.SWARM_BOUND, model["bound_tokens_per_s"], **labels)


def put_servers(sheet: Sheet, facts: Mapping[str, Any]) -> None:  # Any: JSON
    """Each server's own series: of the first MAX_PEERS by their ids, so that they stay the same ones."""
    servers = sorted(
        (peer for peer in facts["peers"] if peer["blocks"] is not None), key=lambda peer: str(peer["peer"])
    )
    for peer in servers[:MAX_PEERS]:
        labels = {"peer": short(peer["peer"]), "name": text(peer["name"], MAX_NAME)}
        sheet.put(of.SERVER_UP, float(peer["state"] == "online"), **labels)
        sheet.put(of.SERVER_RTT, None if peer["rtt_ms"] is None else peer["rtt_ms"] / 1e3, **labels)
        sheet.put(of.SERVER_QUEUE, peer["queue"], **labels)
        sheet.put(of.SERVER_PER_BLOCK, peer["decode_ms_per_block"] / 1e3, **labels)
    sheet.put(of.SERVERS_UNTRACKED, max(0, len(servers) - MAX_PEERS))
