"""The JSON between the gateway's monitor and its page: shapes, a checker, and examples that keep to them.

The monitor's tests hold what it sends against `CONTRACTS`; the page's tests feed the page with the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = (int, float)
Shape = Any  # a type, types, None, a Closed, a Row, a Maybe, [shape of each item], or {key: shape}


@dataclass(frozen=True)
class Closed:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A list of exactly these."""

    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Maybe:
    """This, or null."""

    shape: Shape


BLOCKS = Row((int, int))
HOP_TIMES = Row((str, Maybe(NUMBER), Maybe(NUMBER)))
PEER = {
    "peer": str,
    "name": str,
    "role": Closed(("serve", "bootstrap")),
    "state": Closed(("joining", "online", "draining", "unreachable")),
    "announced_state": str,
    "model": str,
    "blocks": Maybe(BLOCKS),
    "next_blocks": Maybe(BLOCKS),
    "dtype": str,
    "quantize": str,
    "decode_ms_per_block": NUMBER,
    "prefill_tokens_per_s": NUMBER,
    "free_cache_tokens": int,
    "queue": NUMBER,
    "rtt_ms": Maybe(NUMBER),
    "addresses": [str],
    "reach": Closed(("unknown", "public", "relayed", "none")),
    "unreached": Closed(("", "timed out", "refused", "another peer")),
    "punched": bool,
    "helps": bool,
    "relayed_bytes": int,
    "relays": [str],
    "version": str,
    "answers": Closed(("yes", "silent", "unknown")),
    "silent_s": Maybe(NUMBER),
}
MODEL = {
    "model": str,
    "revision": str,
    "blocks": int,
    "coverage": [int],
    "holes": [BLOCKS],
    "unreachable": [str],
    "reached": int,
    "relayed": [str],
    "relayed_blocks": [BLOCKS],
    "complete": bool,
    "survives_any_loss": bool,
    "capacity_tokens_per_s": NUMBER,
    "bound_tokens_per_s": NUMBER,
    "bottleneck_blocks": [int],
    "bottleneck_peers": [str],
}
HOP = {
    "peer": str,
    "name": str,
    "blocks": BLOCKS,
    "held_ms": Maybe(NUMBER),
    "computed_ms": Maybe(NUMBER),
}
SESSION = {
    "id": str,
    "kind": str,
    "model": str,
    "began": NUMBER,
    "hops": [HOP],
    "tokens": int,
    "max_tokens": Maybe(int),
    "tokens_per_second": Maybe(NUMBER),
    "state": Closed(("queued", "prefill", "decode", "recovering", "ended")),
    "recoveries": int,
}
TRACE_KINDS = ("opened", "step", "fault", "rerouted", "replayed", "recovered", "relayed", "ended")
CONTRACTS: Mapping[str, Shape] = {
    "swarm": {
        "at": NUMBER,
        "model": str,
        "revision": str,
        "me": str,
        "recent": {"tokens_per_second": Maybe(NUMBER)},
        "swarm": str,
        "servers": dict.fromkeys(("joining", "online", "draining", "unreachable"), int),
        "peers": [PEER],
        "models": [MODEL],
    },
    "sessions": {"at": NUMBER, "sessions": [SESSION]},
    "peer": {
        "at": NUMBER,
        "peer": str,
        "name": str,
        "what": Closed(("joined", "left", "moved", "silent", "back")),
        "blocks": Maybe(BLOCKS),
    },
    "session": {"at": NUMBER, "id": str, "what": str},
    "traffic": {
        "at": NUMBER,
        "tokens_per_second": Maybe(NUMBER),
        "step_ms_p50": Maybe(NUMBER),
        "step_ms_p95": Maybe(NUMBER),
        "active": int,
        "queued": int,
    },
    "trace": {"id": str, "events": [{"at": NUMBER, "kind": Closed((*TRACE_KINDS, "queued"))}]},
    "raceme": {"hops": [HOP_TIMES], "events": [{"at": NUMBER, "kind": str}]},
}
SESSION_EVENTS: Mapping[str, Shape] = {  # besides the keys of "session"
    "queued": {},
    "opened": {"hops": list},
    "steps": {"tokens": int, "seconds": NUMBER, "hops": [HOP_TIMES]},
    "fault": {"peer": str},
    "rerouted": {"opened": [str], "kept": [str], "hops": list},
    "replayed": {"positions": int, "peer": str},
    "recovered": {"seconds": NUMBER},
    "relayed": {"peer": str},
    "ended": {},
}


def problems(value: Any, shape: Shape, where: str = "$") -> list[str]:
    """Where `value` does not keep to `shape`; keys besides those of a shape are allowed."""
    if isinstance(shape, Maybe):
        return [] if value is None else problems(value, shape.shape, where)
    if isinstance(shape, Closed):
        return [] if value in shape.words else [f"{where} is {value!r}, none of {shape.words}"]
    if isinstance(shape, Row):
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(shape.shapes):
            return [f"{where} is {value!r}, no list of {len(shape.shapes)}"]
        items = zip(value, shape.shapes, strict=True)
        return [each for index, pair in enumerate(items) for each in problems(*pair, f"{where}[{index}]")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is {value!r}, no list"]
        return [each for i, item in enumerate(value) for each in problems(item, shape[0], f"{where}[{i}]")]
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return [f"{where} is {value!r}, no object"]
        missing = [f"{where}.{key} is missing" for key in shape if key not in value]
        return missing + [
            each
            for key in shape
            if key in value
            for each in problems(value[key], shape[key], f"{where}.{key}")
        ]
    wrong = not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool)
    return [f"{where} is {value!r}, no {shape}"] if wrong else []


def event_problems(event: str, data: Any) -> list[str]:
    """Where an event of /api/events does not keep to its contract."""
    if event not in ("swarm", "peer", "session", "traffic"):
        return [f"{event!r} is no event"]
    found = problems(data, CONTRACTS[event])
    if event == "session" and not found:
        what = data["what"]
        return problems(data, SESSION_EVENTS[what]) if what in SESSION_EVENTS else [f"{what!r} is unknown"]
    return found


# Examples


def peer_id(number: int) -> str:
    """A peer id that differs from others in its end."""
    letter = "abcdefghijkmnopqrstuvwxyz"[number % 25]
    return f"12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1r{letter}{number % 9 + 1}M"


def peer(number: int, name: str, blocks: tuple[int, int] | None, **changes: Any) -> dict[str, Any]:
    """A server of the example swarm that is online and answers."""
    facts = {
        "peer": peer_id(number),
        "name": name,
        "role": "serve" if blocks else "bootstrap",
        "state": "online",
        "announced_state": "online",
        "model": "SmolLM2-135M-Instruct" if blocks else "",
        "revision": "9d661ea1c0de" if blocks else "",
        "blocks": list(blocks) if blocks else None,
        "next_blocks": None,
        "dtype": "bfloat16" if blocks else "",
        "quantize": "none",
        "decode_ms_per_block": 2.25 if blocks else 0.0,
        "prefill_tokens_per_s": 812.5 if blocks else 0.0,
        "free_cache_tokens": 65_536 if blocks else 0,
        "queue": 0.0,
        "rtt_ms": 0.8,
        "addresses": [f"/ip4/10.0.0.{number}/tcp/31330"],
        "reach": "unknown",
        "unreached": "",
        "relays": [],
        "punched": False,
        "helps": False,
        "relayed_bytes": 0,
        "version": "0.1.0",
        "answers": "yes",
        "silent_s": None,
    }
    return facts | changes


def silent(facts: dict[str, Any], seconds: float = 3.0) -> dict[str, Any]:
    """The same server, silent for `seconds`."""
    return facts | {"state": "unreachable", "answers": "silent", "silent_s": seconds}


def swarm(peers: Sequence[dict[str, Any]], blocks: int = 30) -> dict[str, Any]:
    """The object of /api/swarm for these servers; coverage and holes follow from them."""
    alive = [each for each in peers if each["blocks"] and each["state"] != "unreachable"]
    serving = [each for each in peers if each["blocks"]]
    held = [sum(each["blocks"][0] <= block < each["blocks"][1] for each in alive) for block in range(blocks)]
    least = min(held)
    model = {
        "model": "SmolLM2-135M-Instruct",
        "revision": "9d661ea1c0de",
        "blocks": blocks,
        "coverage": held,
        "holes": _runs([block for block, count in enumerate(held) if count == 0]),
        "unreachable": [each["peer"] for each in serving if each["state"] == "unreachable"],
        "reached": len(alive),
        "relayed": [each["peer"] for each in alive if each["reach"] == "relayed"],
        "relayed_blocks": [],
        "complete": least > 0,
        "survives_any_loss": least > 1,
        "capacity_tokens_per_s": 43.1 if least else 0.0,
        "bound_tokens_per_s": 44.4,
        "bottleneck_blocks": [block for block, count in enumerate(held) if count == least],
        "bottleneck_peers": [each["peer"] for each in alive[:1]],
    }
    states = ("joining", "online", "draining", "unreachable")
    return {
        "at": 1_790_000_000.0,
        "model": "SmolLM2-135M-Instruct",
        "revision": "9d661ea1c0de",
        "me": peer_id(24),
        "recent": {"tokens_per_second": 12.5},
        "swarm": "5ef7a4690123",
        "servers": {state: sum(each["state"] == state for each in serving) for state in states},
        "peers": [dict(each) for each in peers],  # a test may change its own
        "models": [model] if serving else [],
    }


def _runs(blocks: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])
    return runs


def session(number: int, hops: Sequence[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A session that decodes along these servers."""
    facts = {
        "id": f"req-{number:06x}",
        "kind": "chat",
        "model": "SmolLM2-135M-Instruct",
        "began": 1_790_000_000.0,
        "hops": [
            {
                "peer": hop["peer"],
                "name": hop["name"],
                "blocks": hop["blocks"],
                "held_ms": 17.0,
                "computed_ms": 15.5,
            }
            for hop in hops
        ],
        "tokens": 71,
        "max_tokens": 512,
        "tokens_per_second": 13.1,
        "state": "decode",
        "recoveries": 0,
    }
    return facts | changes
