"""A swarm as plain values, for people and pages: `python -m node status` and the gateway show the same.

A value in, a value out: the view, the round trips from here, and the answers to this node's pings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from routing.blocks import Blocks, coverage, gaps, merged
from routing.names import ModelId, PeerId, Revision
from routing.view.answers import UNKNOWN, Liveness
from routing.view.records import Record, State
from routing.view.view import ModelKey, SwarmView

PRESENT: tuple[State, ...] = ("online", "joining", "draining")
MAX_ASKED = 64  # peers whose presence is asked for, servers of the rarest blocks first
UNREACHABLE = "unreachable"  # a state that pings find; no peer announces it


def worth_asking(view: SwarmView, me: PeerId, most: int = MAX_ASKED) -> list[PeerId]:
    """The peers to ping before the status is shown, the most important first."""
    from routing.placement.cover_gaps import watched
    from routing.placement.rebalance import holders

    records = [r for r in view.records() if r.role != "client" and view.is_dialled(r) and r.peer != me]
    first = [
        peer
        for key in _models(records)
        for peer in watched(holders(view.spans(key.revision, key.blocks, PRESENT)), key.blocks, me, most)
    ]
    others = sorted(records, key=lambda record: record.role != "serve")
    can_be_asked = {record.peer for record in records}
    first = [peer for peer in first if peer in can_be_asked]
    return list(dict.fromkeys([*first, *(record.peer for record in others)]))[:most]


def describe(
    view: SwarmView,
    rtts: Mapping[PeerId, float],
    chains: int = 0,
    *,
    liveness: Mapping[PeerId, Liveness] | None = None,
    direct: Collection[PeerId] = (),
) -> dict[str, Any]:  # Any: JSON
    """The swarm as plain values: `peers`, and for each model its `coverage`, `holes` and `chains`.

    rtts: seconds from here to a peer and back.  chains: how many to list for each model.
    liveness: of a program that watches the peers: then each peer also has its `revision`, `answers` ("yes",
    "silent" or "unknown") and `silent_s`, the seconds of its silence or None.
    direct: the peers with a direct connection from here: one of a relayed peer was punched.
    A peer without an answer (`view.silent`), or one that nobody can dial, is unreachable for any
    announcement, and covers no block.
    """
    records = [record for record in view.records() if record.role != "client"]
    states = {
        r.peer: UNREACHABLE if r.peer in view.silent or not view.reaches(r) else r.state for r in records
    }
    return {
        "swarm": view.swarm,
        "servers": {
            state: sum(record.role == "serve" and states[record.peer] == state for record in records)
            for state in (*PRESENT, UNREACHABLE)
        },
        "peers": [
            _peer(record, states[record.peer], rtts.get(record.peer))
            | {"punched": record.reach == "relayed" and record.peer in direct}
            | _answers(record, view, liveness)
            for record in records
        ],
        "models": [_model(view, key, rtts, chains) for key in _models(records)],
    }


def _models(records: Sequence[Record]) -> list[ModelKey]:
    """One for each revision, under the first of the names that its peers give it."""
    served = sorted((r.model, r.revision, r.blocks) for r in records if r.role == "serve")
    first = {(revision, blocks): name for name, revision, blocks in reversed(served)}
    return sorted(
        ModelKey(ModelId(name), Revision(revision), blocks) for (revision, blocks), name in first.items()
    )


def _model(
    view: SwarmView, key: ModelKey, rtts: Mapping[PeerId, float], chains: int
) -> dict[str, Any]:  # Any: JSON
    spans = view.spans(key.revision, key.blocks)
    held = coverage(spans, key.blocks)
    missing = gaps(spans, Blocks(0, key.blocks))
    return {
        "model": key.model,
        "revision": key.revision,
        "blocks": key.blocks,
        "coverage": list(held),
        "holes": [list(run) for run in missing],
        "unreachable": [
            span.peer
            for span in view.spans(key.revision, key.blocks, silent=True)
            if span.peer in view.silent or not view.reaches(span)
        ],
        "reached": len(spans),
        "relayed": [span.peer for span in spans if span.reach == "relayed"],
        "relayed_blocks": [list(run) for run in _relayed_blocks(spans, key.blocks)],
        "complete": not missing,
        "survives_any_loss": min(held) > 1,
        **_throughput(spans, key.blocks),
        **({"chains": _chains(spans, key.blocks, rtts, chains)} if chains else {}),
    }


def _relayed_blocks(spans: Sequence[Record], blocks: int) -> list[Blocks]:
    """The served blocks all of whose servers are reached through relays alone."""
    direct = gaps([span for span in spans if span.reach != "relayed"], Blocks(0, blocks))
    held = merged(span.span for span in spans)
    found = [run.overlap(whole) for run in direct for whole in held]
    return [run for run in found if run.size]


def _chains(
    spans: Sequence[Record], blocks: int, rtts: Mapping[PeerId, float], most: int
) -> list[dict[str, Any]]:  # Any: JSON
    """The best chains from here, with as few servers in common as possible."""
    from routing.chains.alternatives import best_chains
    from routing.chains.search import CostInputs, NoChain, cheapest_chain

    try:
        found = best_chains(partial(cheapest_chain, spans, blocks, known=CostInputs(client_rtt=rtts)), most)
    except NoChain:
        return []
    return [
        {
            "expected_ms_per_token": round(chain.expected_seconds * 1e3, 3),
            "hops": [{"peer": hop.peer, "blocks": [hop.start, hop.stop]} for hop in chain.hops],
        }
        for chain in found
    ]


def _throughput(spans: Sequence[Record], blocks: int) -> dict[str, Any]:  # Any: JSON
    """Tokens per second of all peers together, by their announced rates, and the bottleneck.

    One token of one session at a time in each server: batches do more.  A moving peer counts with the
    blocks that it still serves.
    """
    from routing.placement.rebalance import holders
    from routing.placement.throughput import bottleneck, bound

    held = holders([replace(span, next_start=0, next_stop=0) if span.moves else span for span in spans])
    narrow = bottleneck(held, blocks)
    limiting = set(narrow.blocks)
    return {
        "capacity_tokens_per_s": round(narrow.capacity, 3),
        "bound_tokens_per_s": round(bound(held, blocks), 3),
        "bottleneck_blocks": list(narrow.blocks),
        "bottleneck_peers": [h.peer for h in held if not limiting.isdisjoint(range(h.start, h.stop))],
    }


def _peer(record: Record, state: str, rtt: float | None) -> dict[str, Any]:  # Any: JSON
    return {
        "peer": record.peer,
        "name": record.name,
        "role": record.role,
        "state": state,
        "announced_state": record.state,
        "model": record.model,
        "blocks": [record.start, record.stop] if record.role == "serve" else None,
        "next_blocks": [record.next_start, record.next_stop] if record.moves else None,
        "dtype": record.dtype,
        "quantize": record.quantize,
        "decode_ms_per_block": round(record.seconds_per_block * 1e3, 4),
        "prefill_tokens_per_s": round(_prefill_rate(record), 1),
        "free_cache_tokens": record.cache_tokens,
        "queue": record.queue,
        "rtt_ms": None if rtt is None else round(rtt * 1e3, 3),
        "addresses": list(record.addresses),
        "reach": record.reach,
        "unreached": record.unreached,
        "relays": list(record.relays),
        "helps": record.helps,
        "relayed_bytes": record.relayed_bytes,
        "version": record.version,
    }


def _answers(
    record: Record, view: SwarmView, liveness: Mapping[PeerId, Liveness] | None
) -> dict[str, Any]:  # Any: JSON
    if liveness is None:
        return {}
    found = liveness.get(record.peer, UNKNOWN)
    # The view may be a moment older than the answers: a peer's state and its answers say the same.
    silent, seconds = record.peer in view.silent, found.silent_seconds
    answers = "silent" if silent else found.answers.replace("silent", "unknown")
    return {
        "revision": record.revision,
        "answers": answers,
        "silent_s": round(seconds, 1) if silent and seconds is not None else None,
    }


def _prefill_rate(record: Record) -> float:
    """Prefill tokens per second through the whole span of a peer; 0 where not measured."""
    seconds = record.prefill_seconds_per_token * (record.stop - record.start)
    return 1 / seconds if seconds > 0 else 0.0
