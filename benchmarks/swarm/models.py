"""The settings of `benchmarks swarm`: GPUs, models, the events of the servers, and the places of peers.

A `Script` is drawn before the run, independent of any rule: servers then join and crash alike under every
rule.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from tensor_codec.limits import Limits

VIEW_SECONDS = 5.0  # the largest age of a view: records are flooded, and losses are repaired at this interval
ANNOUNCE_SECONDS = Limits().announce_seconds
TTL_SECONDS = Limits().record_ttl_seconds
REST_SECONDS = 600.0
PARTED_SECONDS = 600.0
LIE = 100.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A GPU: the blocks that it holds, its block-tokens per second, its share of the servers."""

    name: str
    count: int
    rate: float
    share: float


@dataclass(frozen=True, slots=True)
class Model:
    """A case: blocks, their size in gigabytes, and the GPUs that hold them."""

    blocks: int
    block_gb: float
    kinds: tuple[Kind, ...]


NAMES, SHARES = ("3060", "T4", "3090", "4090", "A100"), (0.3, 0.2, 0.3, 0.1, 0.1)


def _kinds(counts: tuple[int, ...], rates: tuple[float, ...]) -> tuple[Kind, ...]:
    return tuple(Kind(*row) for row in zip(NAMES, counts, rates, SHARES, strict=True))


MODELS = {  # in 8 bits
    "llama-70b": Model(80, 0.9, _kinds((10, 14, 22, 24, 70), (400, 330, 1040, 1100, 2200))),
    "llama-405b": Model(126, 3.2, _kinds((3, 4, 7, 7, 24), (120, 100, 310, 330, 660))),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The events of a run.

    churn: share of the servers replaced per hour, from the last join on, over `seconds`.
    lost: share of the servers, a region, that crash together in the middle of that time.
    partition: share of the servers that are cut off from the others for ten minutes after that.
    noise: the largest error of an announced rate, drawn anew for each announcement.
    join_seconds: between two joins.  load_gb_per_s: of a server that loads blocks.
    """

    model: Model
    servers: int
    seed: int
    churn: float = 0.0
    lost: float = 0.0
    liars: float = 0.0
    partition: float = 0.0
    noise: float = 0.0
    seconds: float = 3600.0
    join_seconds: float = 10.0
    load_gb_per_s: float = 0.25

    @property
    def began(self) -> float:
        """The start of the observation, in seconds."""
        return self.servers * self.join_seconds + REST_SECONDS


class Hardware(NamedTuple):
    """A server's hardware.  name: 16 hexadecimal digits.  lies: announces LIE times its rate."""

    name: str
    block_count: int
    rate: float
    lies: bool


class Crash(NamedTuple):
    """Servers that crash at one moment; others announce each of them for the given seconds more."""

    at: float
    gone: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Script:
    """Joins, crashes, and the servers that are cut off; in seconds from the first join."""

    joins: list[tuple[float, Hardware]] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    cut_off: frozenset[str] = frozenset()


def script(plan: Plan) -> Script:
    """The events of the servers of this seed."""
    draws, chance = random.Random(f"servers {plan.seed}"), random.Random(f"fate {plan.seed}")
    found = Script([(n * plan.join_seconds, _hardware(plan, draws)) for n in range(plan.servers)])
    alive, half_way = [server.name for _, server in found.joins], plan.began + plan.seconds / 2
    lost = (plan.lost > 0) * [half_way]
    for at in sorted([*_replacements(plan, chance), *lost]):
        number = round(plan.lost * len(alive)) if at in lost else 1
        names = chance.sample(alive, number)
        found.crashes.append(
            Crash(at, tuple((n, TTL_SECONDS - chance.uniform(0, ANNOUNCE_SECONDS)) for n in names))
        )
        alive = [name for name in alive if name not in names]
        if at not in lost:
            found.joins.append((at, _hardware(plan, draws)))
            alive.append(found.joins[-1][1].name)
    if plan.partition:
        found.cut_off = frozenset(chance.sample(alive, round(plan.partition * len(alive))))
    return found


def _hardware(plan: Plan, draws: random.Random) -> Hardware:
    kinds = plan.model.kinds
    kind = draws.choices(kinds, [kind.share for kind in kinds])[0]
    rate, lies = kind.rate * draws.uniform(0.7, 1.1), draws.random() < plan.liars
    return Hardware(f"{draws.getrandbits(64):016x}", kind.count, rate, lies)


def _replacements(plan: Plan, chance: random.Random) -> list[float]:
    times, at = [], plan.began
    while (
        plan.churn
        and (at := at + chance.expovariate(plan.churn * plan.servers / 3600)) < plan.began + plan.seconds
    ):
        times.append(at)
    return times


# The places of servers and clients: five regions with the round trips between their big data centres.
REGIONS = ("US east", "US west", "Europe", "East Asia", "South America")
PEOPLE = (0.3, 0.2, 0.3, 0.15, 0.05)  # of servers and clients alike
RTT_MS = (
    (12, 65, 80, 190, 120),
    (65, 12, 140, 130, 180),
    (80, 140, 12, 230, 190),
    (190, 130, 230, 20, 300),
    (120, 180, 190, 300, 20),
)
SERVER_LINE_MS = (1.0, 8.0)  # there and back
CLIENT_LINE_MS = (2.0, 15.0)


@dataclass(frozen=True, slots=True)
class Place:
    """A region, and the seconds from a peer to its region's middle and back."""

    region: int
    line: float

    def rtt(self, other: Place) -> float:
        """Seconds to another place and back."""
        return RTT_MS[self.region][other.region] / 1e3 + self.line + other.line


def somewhere(rng: random.Random, line_ms: tuple[float, float]) -> Place:
    """A random place."""
    return Place(rng.choices(range(len(REGIONS)), PEOPLE)[0], rng.uniform(*line_ms) / 1e3)
