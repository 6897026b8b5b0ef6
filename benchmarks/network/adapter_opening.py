"""How much longer a session takes to open with an adapter: one that servers lack, and one that they have.

A part of `python -m benchmarks adapters`.  Real nodes on this machine; the client opens sessions in turn
without an adapter, with a new one (cold) and with the same one again (warm), and closes each.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.lib.processes import equal_spans, local_swarm

if TYPE_CHECKING:
    from node.model.checkpoint.folder import ModelFolder
    from tensor_codec.adapters import AdapterContent

HOPS = 3
MAX_LENGTH = 64


def opening_row(model: str | None, *, rounds: int, rank: int = 16) -> dict[str, Any]:
    """A row of the benchmark.  model: a folder or a name.  rank: of adapters at all linears, in bfloat16."""
    from node.model.checkpoint.info import read_info
    from node.model.checkpoint.source import cache_dir, resolve

    folder = resolve(model, cache_dir=cache_dir())
    info = read_info(folder)
    common = [*([model] if model else []), "--dtype", "float32", "--threads", "1", "--device", "cpu"]
    with local_swarm(common, environment={"OMP_NUM_THREADS": "1"}) as swarm:
        swarm.start_spans(equal_spans(info.blocks, HOPS))
        found = trio.run(_measured, model, swarm.peers, folder, rounds, rank)
    extra = {
        case: 1e3 * statistics.median(map(float.__sub__, found[case], found["none"]))
        for case in ("cold", "warm")
    }
    row = {
        "case": f"open r{rank} all, {HOPS} hops",
        "rounds": rounds,
        "ms": None,
        "slowdown": None,
        "adapters_mib": found["mib"][0],
        "open_ms": 1e3 * statistics.median(found["none"]),
        "cold_open_extra_ms": extra["cold"],
        "warm_open_extra_ms": extra["warm"],
    }
    print(
        f"{row['case']:24} {row['open_ms']:6.2f} ms to open, cold {row['cold_open_extra_ms']:+.1f} ms"
        f" ({row['adapters_mib']:.1f} MiB), warm {row['warm_open_extra_ms']:+.2f} ms",
        flush=True,
    )
    return row


async def _measured(
    model: str | None, peers: Sequence[str], folder: ModelFolder, rounds: int, rank: int
) -> Mapping[str, list[float]]:
    """Seconds of every opening, by case; the size of an adapter under "mib"."""
    import client

    shapes = shapes_of(folder)
    found: dict[str, list[float]] = {"none": [], "cold": [], "warm": [], "mib": []}
    async with client.connect(model, peers=peers) as swarm:
        await swarm.route()
        for seed in range(-1, rounds):
            own = random_content(folder.revision, shapes, rank, seed)
            found["mib"] = [own.nbytes / 2**20]
            for case, adapter in (("none", None), ("cold", own), ("warm", own)):
                began = time.perf_counter()
                session = await swarm.open_session(max_length=MAX_LENGTH, adapter=adapter)
                seconds = time.perf_counter() - began
                session.close()
                await trio.sleep(0.05)
                if seed >= 0:  # the first round makes the connections
                    found[case].append(seconds)
    return found


def shapes_of(folder: ModelFolder) -> list[Mapping[str, tuple[int, int]]]:
    """Of each block its linears: features in and out.  The blocks of a llama are alike."""
    from node.model.adapters.sites import site_shapes
    from node.model.blocks.span import DTYPES, load_span
    from node.model.checkpoint.info import read_info

    one = site_shapes(load_span(folder, 0, 1, dtype=DTYPES["float32"], device="cpu"))[0]
    return [one] * read_info(folder).blocks


def random_content(
    revision: str, shapes: Sequence[Mapping[str, tuple[int, int]]], rank: int, seed: int
) -> AdapterContent:
    """A bfloat16 adapter at all sites; its id is known, as that of an adapter that was read from a file."""
    import torch

    from tensor_codec.adapters import AdapterContent, AdapterManifest, LoraSite

    generator = torch.Generator().manual_seed(seed + 1)
    tables, blobs = [], []
    for sites in shapes:
        tables.append(tuple(LoraSite(name, rank, 2.0) for name in sites))
        parts = []
        for ins, outs in sites.values():
            parts += [torch.randn(rank * ins, generator=generator) / math.sqrt(ins)]
            parts += [torch.randn(rank * outs, generator=generator) * 0.01]
        values = torch.cat(parts).to(torch.bfloat16)
        blobs.append(values.view(torch.int16).numpy().tobytes())
    own = AdapterContent(AdapterManifest(revision, "bf16", tuple(tables)), tuple(blobs))
    assert own.id
    return own
