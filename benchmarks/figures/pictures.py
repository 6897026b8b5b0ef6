"""Pictures of the documents, drawn out of results: a swarm, capacity by placement, waits of clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.figures import svg
from benchmarks.figures.blocks.swarm import RULES, STILL, Row, case_name, rows_of
from benchmarks.figures.tables import Figures

COLOURS = {
    "ours": svg.BLUE, "petals": svg.RED, "petals-join": svg.YELLOW, "equal": svg.GREY, "random": svg.SAND,
}  # fmt: skip
CASES = {"llama-405b": "126 blocks, held a few times each", "llama-70b": "80 blocks, room for many copies"}
# Servers of the picture of a swarm: name, first block, the block after the last one, row; of thirty blocks.
BLOCKS = 30
SERVERS = (
    ("server A", 0, 10, 0), ("server B", 10, 20, 0), ("server C", 20, 30, 0),
    ("server D", 4, 16, 1), ("server E", 16, 30, 1),
)  # fmt: skip
CHAIN = ("server A", "server B", "server C")


def swarm_picture(figures: Figures) -> str:
    """A swarm of five servers, and the chain of one client through three of them."""
    left, width, top, height = 190.0, 560.0, 96.0, 44.0

    def at(block: int) -> float:
        return left + width * block / BLOCKS

    shapes = [
        svg.text(left, 32, "the model's transformer blocks", colour=svg.SOFT),
        *(
            svg.rect(at(block) + 1, 42, width / BLOCKS - 2, 14, svg.GRID, round_by=2)
            for block in range(BLOCKS)
        ),
        svg.text(at(0), 72, "0", size=11, colour=svg.SOFT),
        svg.text(at(BLOCKS), 72, str(BLOCKS - 1), size=11, anchor="end", colour=svg.SOFT),
        svg.rect(24, top, 116, height, "#eef4fa", line=svg.BLUE, round_by=6),
        svg.text(82, top + 19, "client", anchor="middle"),
        svg.text(82, top + 35, "embeddings, head", size=11, anchor="middle", colour=svg.SOFT),
    ]
    for name, start, stop, row in SERVERS:
        chosen, y = name in CHAIN, top + row * 76
        fill, border = ("#dcebf7", svg.BLUE) if chosen else ("#f6f8fa", svg.GREY)
        x, wide = at(start) + 12, at(stop) - at(start) - 24
        shapes += [
            svg.rect(x, y, wide, height, fill, line=border, round_by=6),
            svg.text(x + wide / 2, y + 19, name, anchor="middle", colour=svg.INK if chosen else svg.SOFT),
            svg.text(
                x + wide / 2,
                y + 35,
                f"blocks {start} to {stop - 1}",
                size=11,
                anchor="middle",
                colour=svg.SOFT,
            ),
        ]
    middle, end = top + height / 2, left + width - 12
    joints = [140.0, at(0) + 12, at(10) - 12, at(10) + 12, at(20) - 12, at(20) + 12]
    for begin, stop_at in zip(joints[::2], joints[1::2], strict=True):
        shapes.append(svg.arrow((begin, middle), (stop_at, middle), svg.BLUE))
    way = top + 2 * 76
    shapes += [
        svg.line(
            [(end, middle), (end + 26, middle), (end + 26, way), (82, way), (82, top + height + 10)],
            svg.BLUE, width=2,
        ),
        svg.arrow((82, top + height + 14), (82, top + height), svg.BLUE),
        svg.text(
            left + 12, way - 7, "hidden states go from server to server; the last one answers the client",
            colour=svg.SOFT,
        ),
    ]  # fmt: skip
    one, three = figures["decode-1"], figures["decode-3"]
    shapes.append(
        svg.text(
            24,
            way + 30,
            f"measured, SmolLM2-135M in {one['dtype']}, one thread each: {one['steps_per_s']:.1f} tokens/s"
            f" through one server, {three['steps_per_s']:.1f} through three,",
        )
    )
    shapes.append(
        svg.text(
            24, way + 48, f"{one['reference_steps_per_s']:.1f} by transformers' generate in one process."
        )
    )
    return svg.picture(800, way + 66, shapes, "A client's chain through three of a swarm's five servers")


class Frame(NamedTuple):
    """The place of a chart, in the picture's units; y runs down."""

    x: float
    y: float
    width: float
    height: float


def shares_picture(figures: Figures) -> str:
    """Capacity over its bound at rest: a bar to the mean of the seeds, a line down to the least seed."""
    rows = rows_of(figures, **STILL, clients=0)
    models = [model for model in CASES if any(row["model"] == model for row in rows)]
    shapes: list[str] = []
    for number, model in enumerate(models):
        frame = Frame(60 + 420 * number, 40, 360, 240)
        mine = [row for row in rows if row["model"] == model]
        shapes += [*_shares(frame, mine), svg.text(frame.x, 24, f"{model}: {CASES[model]}")]
    shapes += _legend(60, 336, [(RULES[rule], COLOURS[rule], "") for rule in COLOURS])
    shapes.append(
        svg.text(60, 360, "capacity / bound; the line goes down to the worst seed", colour=svg.SOFT)
    )
    return svg.picture(60 + 420 * len(models), 372, shapes, "Capacity over its bound, by rule of placement")


def _shares(frame: Frame, rows: Sequence[Row]) -> list[str]:
    sizes = sorted({row["servers"] for row in rows})
    rules = [rule for rule in COLOURS if any(row["rule"] == rule for row in rows)]
    group = frame.width / len(sizes)
    bar = 0.8 * group / len(rules)

    def height(share: float) -> float:
        return frame.y + frame.height * (1 - share)

    shapes = _grid(frame, [(height(tick), f"{tick:g}") for tick in (0, 0.25, 0.5, 0.75, 1.0)])
    for row in rows:
        x = frame.x + group * (sizes.index(row["servers"]) + 0.1) + bar * rules.index(row["rule"])
        mean, least = height(row["share_of_bound_mean"]), height(row["share_of_bound_min"])
        shapes.append(svg.rect(x, mean, bar * 0.92, frame.y + frame.height - mean, COLOURS[row["rule"]]))
        shapes.append(svg.line([(x + bar * 0.46, mean), (x + bar * 0.46, least)], svg.INK))
    for number, size in enumerate(sizes):
        x = frame.x + group * (number + 0.5)
        shapes.append(svg.text(x, frame.y + frame.height + 16, f"{size:,} servers", size=11, anchor="middle"))
    return shapes


def latencies_picture(figures: Figures) -> str:
    """Seconds of a token, median and 95th percentile over the sessions, by the load; log scale."""
    rows = [row for row in rows_of(figures, **STILL) if row["clients"]]
    cases = sorted({case_name(row) for row in rows})
    shapes: list[str] = []
    for number, case in enumerate(cases):
        frame = Frame(60 + 420 * number, 40, 350, 240)
        mine = [row for row in rows if case_name(row) == case]
        shapes += [*_latencies(frame, mine), svg.text(frame.x, 24, f"{mine[0]['model']}, {case}")]
    names = [
        (f"{RULES[rule]}, {name}", COLOURS[rule], dash)
        for rule in ("ours", "petals")
        for name, dash in (("p50", "5 4"), ("p95", ""))
    ]
    shapes += _legend(60, 352, [*names, ("all-seeing, p95", svg.INK, "2 3")])
    shapes.append(
        svg.text(
            60,
            320,
            "across: tokens asked for / capacity of the placement; up: seconds a token",
            colour=svg.SOFT,
        )
    )
    return svg.picture(60 + 420 * len(cases), 372, shapes, "Seconds of a token by the load of a swarm")


def _latencies(frame: Frame, rows: Sequence[Row]) -> list[str]:
    best = [
        {**row, "best": row["latency_p95_s"] / row["latency_ratio_p95"]}
        for row in rows
        if row["rule"] == "ours"
    ]
    values = [row[key] for row in rows for key in ("latency_p50_s", "latency_p95_s")]
    low, high = math.log(min([*values, *(row["best"] for row in best)])), math.log(max(values))
    loads = sorted({row["load"] for row in rows})

    def place(row: Row, key: str) -> tuple[float, float]:
        across = (row["load"] - loads[0]) / (loads[-1] - loads[0] or 1)
        return (
            frame.x + frame.width * (0.05 + 0.9 * across),
            frame.y + frame.height * (1 - (math.log(row[key]) - low) / (high - low)),
        )

    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16) if low <= math.log(tick) <= high]
    shapes = _grid(
        frame, [(frame.y + frame.height * (1 - (math.log(t) - low) / (high - low)), f"{t:g}") for t in ticks]
    )
    for rule in ("ours", "petals"):
        mine = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["load"])
        for key, dash in (("latency_p50_s", "5 4"), ("latency_p95_s", "")):
            points = [place(row, key) for row in mine]
            shapes.append(svg.line(points, COLOURS[rule], width=2, dash=dash))
            shapes += [svg.dot(x, y, COLOURS[rule]) for x, y in points]
    best.sort(key=lambda row: row["load"])
    shapes.append(svg.line([place(row, "best") for row in best], svg.INK, width=1.5, dash="2 3"))
    for load in loads:
        x, _ = place({"load": load, "at": math.exp(low)}, "at")
        shapes.append(svg.text(x, frame.y + frame.height + 16, f"{load:g}", size=11, anchor="middle"))
    return shapes


def _grid(frame: Frame, ticks: Sequence[tuple[float, str]]) -> list[str]:
    shapes = []
    for y, name in ticks:
        shapes.append(svg.line([(frame.x, y), (frame.x + frame.width, y)], svg.GRID))
        shapes.append(svg.text(frame.x - 6, y + 4, name, size=11, anchor="end", colour=svg.SOFT))
    return shapes


def _legend(x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names and colours; a dash makes a line in place of a square."""
    shapes = []
    for number, (name, colour, dash) in enumerate(entries):
        left = x + 132 * number
        shapes.append(
            svg.line([(left, y - 4), (left + 20, y - 4)], colour, width=4 if not dash else 2, dash=dash)
        )
        shapes.append(svg.text(left + 26, y, name, size=11))
    return shapes


PICTURES: Mapping[str, Callable[[Figures], str]] = {
    "docs/swarm.svg": swarm_picture,
    "docs/swarm-share.svg": shares_picture,
    "docs/swarm-latency.svg": latencies_picture,
}
