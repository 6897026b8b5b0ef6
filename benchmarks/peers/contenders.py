"""The rows of `benchmarks peers`: contenders, their threads, their peers, and figures of rounds.  Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.decode.decode import equal_share

RACEME, LLAMA, TRANSFORMERS = "raceme", "llama.cpp", "transformers"
KINDS: Mapping[str, str] = {"int8": "Q8_0", "bf16": "BF16", "float32": "F32"}  # ours, and llama.cpp's name
NODE_FLAGS: Mapping[str, Sequence[str]] = {
    "int8": ("--dtype", "float32", "--quantize", "int8"),
    "bf16": ("--dtype", "bfloat16", "--quantize", "none"),
    "float32": ("--dtype", "float32", "--quantize", "none"),
}
SERVERS = (1, 3)
MANY_SERVERS = 3  # of llama.cpp, for many clients: its RPC with one server is a row for one client alone


@dataclass(frozen=True, slots=True)
class Contender:
    """One row.

    kind: of the weights, a key of KINDS.  servers: nodes of ours or ggml-rpc-servers; 0: no server besides
    the process that has the whole model.  clients: generations at a time.  total_threads: see `threads_of`;
    0: those of the run.
    """

    program: str
    kind: str
    servers: int
    clients: int = 1
    total_threads: int = 0

    @property
    def name(self) -> str:
        """The program with its weights and servers; rows of several clients have the same one."""
        if self.program == RACEME:
            return f"raceme-{self.kind}-{self.servers}"
        if self.program == LLAMA:
            return f"llama.cpp-{KINDS[self.kind]}-{f'rpc-{self.servers}' if self.servers else 'local'}"
        return f"transformers-{self.kind}"

    @property
    def label(self) -> str:
        """The name, and after it the clients where there are several, and threads of its own."""
        clients = "" if self.clients == 1 else f"-x{self.clients}"
        return f"{self.name}{clients}{f'-t{self.total_threads}' if self.total_threads else ''}"

    @property
    def peer(self) -> Contender | None:
        """The row of llama.cpp next to a row of ours: its local one, or its RPC with as many servers."""
        if self.program != RACEME:
            return None
        servers = self.servers if self.servers > 1 else 0
        return Contender(LLAMA, self.kind, servers, self.clients, self.total_threads)


def all_contenders(
    many: int, transformers: bool = False, many_threads: Sequence[int] = (0,)
) -> list[Contender]:
    """Every row, kind after kind.

    many: clients of the rows for several; 0: without these rows.  many_threads: `Contender.total_threads` of
    these rows, which are there once for each number.
    """
    rows = []
    for kind in KINDS:
        rows += [Contender(RACEME, kind, servers) for servers in SERVERS]
        rows += [Contender(LLAMA, kind, servers) for servers in (0, *SERVERS)]
        if transformers and kind == "float32":
            rows.append(Contender(TRANSFORMERS, kind, 0))
        for total in many_threads if many else ():
            rows += [Contender(RACEME, kind, servers, many, total) for servers in SERVERS]
            rows += [Contender(LLAMA, kind, servers, many, total) for servers in (0, MANY_SERVERS)]
    return rows


def chosen(rows: Sequence[Contender], patterns: Sequence[str]) -> list[Contender]:
    """The rows with a label that one of the patterns (of a shell) matches; all of them without a pattern.

    Raises ValueError for a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.label, pattern) for row in rows):
            raise ValueError(f"{pattern} matches no row of {', '.join(row.label for row in rows)}")
    return [row for row in rows if not patterns or any(fnmatchcase(row.label, each) for each in patterns)]


def by_kind(rows: Sequence[Contender]) -> list[list[Contender]]:
    """The rows that are compared with each other: those of one kind of weights."""
    groups = ([row for row in rows if row.kind == kind] for kind in KINDS)
    return [group for group in groups if group]


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads that compute, in each server and in the process of the client (or that has the whole model)."""

    server: int
    client: int


def threads_of(row: Contender, total: int) -> Threads:
    """The threads of a row, so that about `total` of them can compute at any moment, whatever the row.

    Processes that work in turn have `total` each: the ggml-rpc-servers, which llama.cpp asks one after the
    other; and for one client all of ours.  Processes that work at the same moment, nodes and client of ours
    with several generations, divide them; one is the least.
    """
    if row.program == RACEME and row.clients > 1:
        each = max(1, total // (row.servers + 1))
        return Threads(each, each)
    if row.program == LLAMA and row.servers:
        return Threads(total, 1)  # llama-server itself embeds and samples
    return Threads(total, total)


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.  tokens: ids.  at: the seconds of each token, since the request."""

    tokens: tuple[int, ...]
    at: tuple[float, ...]

    @property
    def steps_per_s(self) -> float:
        """Decode steps a second, from the first token to the last.  ValueError for fewer than two tokens."""
        if len(self.at) < 2 or self.at[-1] <= self.at[0]:
            raise ValueError(f"no decode step can be timed in {len(self.at)} tokens")
        return (len(self.at) - 1) / (self.at[-1] - self.at[0])


@dataclass(frozen=True, slots=True)
class Round:
    """The answers to one round of a row.  seconds: from the first request to the last token."""

    generations: tuple[Generation, ...]
    seconds: float

    @property
    def steps_per_s(self) -> float:
        """Of one client, median over the clients."""
        return statistics.median(each.steps_per_s for each in self.generations)

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together, with the wait for the first token."""
        return sum(len(each.tokens) for each in self.generations) / self.seconds

    @property
    def ttft_seconds(self) -> float:
        """To the first token, median over the clients."""
        return statistics.median(each.at[0] for each in self.generations)


def wanted_ratio(row: Contender) -> float | None:
    """What a row of ours shall reach of its peer; None for a row of others.  Aims of the project."""
    if row.program != RACEME:
        return None
    if row.clients > 1:
        return 2.3 if row.servers == 1 else 2.0
    return 1.05 if row.kind == "int8" and row.servers > 1 else 1.0


def figures(
    measured: Mapping[Contender, Sequence[Round]], total: Mapping[Contender, int]
) -> list[dict[str, Any]]:  # Any: JSON
    """One row of results for each contender: medians over its rounds.

    A ratio is the median of the ratios within each round, so that a machine whose speed drifts is equally
    fast for both.  total: the threads of `threads_of`.
    """
    rows = []
    for row, rounds in measured.items():
        threads = threads_of(row, total[row])
        rows.append(
            {
                "name": row.name,
                "clients": row.clients,
                "servers": row.servers,
                "steps_per_s": statistics.median(each.steps_per_s for each in rounds),
                "aggregate_tokens_per_s": statistics.median(each.tokens_per_s for each in rounds),
                "ttft_ms": 1e3 * statistics.median(each.ttft_seconds for each in rounds),
                "threads": threads.server if row.servers else threads.client,
                "client_threads": threads.client,
                "total_threads": total[row],
                "rounds": len(rounds),
                **compared(row, rounds, measured.get(row.peer) if row.peer is not None else None),
            }
        )
    return rows


def compared(
    row: Contender, ours: Sequence[Round], theirs: Sequence[Round] | None
) -> dict[str, Any]:  # Any: JSON
    """The keys of a comparison; each is None where a row has no peer in the run.

    ratio_to_peer: of the speed, decode steps of one client or tokens of several.  ttft_ratio_to_peer: of the
    times to the first token, below 1 where ours is sooner.  same_tokens: the share of tokens before the first
    difference, of the first round.
    """
    speed = ttft = same = None
    if theirs is not None:
        pairs = list(zip(ours, theirs, strict=True))
        speed = statistics.median(
            mine.steps_per_s / other.steps_per_s
            if row.clients == 1
            else mine.tokens_per_s / other.tokens_per_s
            for mine, other in pairs
        )
        ttft = statistics.median(mine.ttft_seconds / other.ttft_seconds for mine, other in pairs)
        first = zip(ours[0].generations, theirs[0].generations, strict=True)
        same = statistics.mean(equal_share(mine.tokens, other.tokens) for mine, other in first)
    return {
        "peer": row.peer.name if row.peer is not None else None,
        "ratio_to_peer": speed,
        "wanted_ratio": wanted_ratio(row),
        "ttft_ratio_to_peer": ttft,
        "same_tokens": same,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:  # Any: JSON
    """A line for each row with its figures, then one for each comparison and what it shall reach."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{row['name']:{width}} {row['clients']:3} clients {row['steps_per_s']:8.1f} steps/s"
        f" {row['aggregate_tokens_per_s']:8.1f} tokens/s {row['ttft_ms']:8.1f} ms to the first token"
        f"   threads {row['threads']} + {row['client_threads']}"
        for row in rows
    ]
    for row in rows:
        if row["ratio_to_peer"] is None:
            continue
        reached = "yes" if row["ratio_to_peer"] >= row["wanted_ratio"] else "no"
        sooner = "yes" if row["ttft_ratio_to_peer"] <= 1 else "no"
        lines.append(
            f"{row['name']} / {row['peer']}, {row['clients']} clients:"
            f" {row['ratio_to_peer']:.2f} (at least {row['wanted_ratio']}: {reached}),"
            f" first token {row['ttft_ratio_to_peer']:.2f} (at most 1: {sooner}),"
            f" equal tokens {row['same_tokens']:.2f}"
        )
    return lines
