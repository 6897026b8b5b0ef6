"""How fast this node computes: measured at start, kept in a file, corrected by the steps served.

Two figures are announced, and clients choose chains by them (see routing/chains/search.py): the seconds of a
block for one decode step of one session, and for one token of a prefill.  Waiting is not in them; the
record's `queue` announces it.

A decode step shares its batch with steps of other sessions.  No session has its answer before the batch is
done, so the batch's whole time counts for each step: the next session will see it too.  When the other
sessions leave and nothing is served, no batch would show that a step is quick again, and clients avoid a
slow server.  Hence `alone`, the time of a step of one row: an idle node's figure returns to it.  `alone`
goes into the file, because the next start has no other sessions.

The measurement at start may have become wrong.  Nodes that start together on one machine each find it
busy, and an unused spare would stay five times as slow for all clients.  So an idle node measures a few
steps again now and then (`Engine.measure_again`).
"""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from node.devices import has_own_memory, index_of, kind_of
from node.runtime.files import write_atomically
from node.serving.executor.batch_cost import OUTLIER_FACTOR
from routing.names import Revision

if TYPE_CHECKING:
    from torch import Tensor


log = logging.getLogger("raceme")

EMA_WEIGHT = 0.1  # of the newest batch in the running figures
WHOLE_CHUNK_TOKENS = 64  # a shorter prefill mostly reads weights: it counts for less
LEAST_CHUNK_TOKENS = 16  # a shorter one takes about as long as a decode step: it says nothing about a token
MEASURED_TOKENS = 64  # of a prefill at start, and decode steps after it
MIN_PREFILL_TOKENS = 8
CHECK_SECONDS = 0.2  # for checking whether the kept figures are still about right
ABOUT_RIGHT = 2.0  # times slower or faster
SAME = 1.5  # times slower or faster: caches of real lengths make so much of a difference, and no more
SET_UP_STEPS = 3  # on a GPU: one that compiles kernels, one that records a graph, the graph's first one
GPU_CHUNK = 256  # tokens of a prefill there: a client's chunk; fewer take as long
GPU_STEPS = 16  # decode steps that such a chunk takes at the most
FILE_FORMAT = 2  # before: prefills of few tokens counted, and made the figure ten times too large
MAX_KEPT = 128  # figures in the file; the oldest are dropped
MAX_FILE_BYTES = 1 << 20
MAX_BLOCK_SECONDS = 3600.0  # beyond it the file is damaged


@dataclass(slots=True)
class Rates:
    """Seconds that a block takes: for one decode step, and for each token of a prefill.

    alone: a decode step in a batch of one row.
    """

    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float
    alone: float = field(init=False)
    _served: bool = False  # since the last `relax`
    _learnt: bool = False  # whether steps that were served say what `alone` is

    def __post_init__(self) -> None:
        self.alone = self.decode_seconds_per_block

    def observe(self, rows_tokens: int, blocks: float, seconds: float, decode: bool) -> None:
        """Fold a served batch into the running figures.

        rows_tokens: rows of a decode batch, or rows times tokens of a prefill's chunk.
        blocks: of the batch.  seconds: of computing all of it.
        """
        per_block = seconds / blocks
        if decode:
            self._served = True
            if rows_tokens == 1 or per_block < self.alone:  # more rows never make it faster
                self.alone += EMA_WEIGHT * (min(per_block, OUTLIER_FACTOR * self.alone) - self.alone)
                self._learnt = True
            known = self.decode_seconds_per_block
            known += EMA_WEIGHT * (min(per_block, OUTLIER_FACTOR * known) - known)
            self.decode_seconds_per_block = known
        elif rows_tokens >= LEAST_CHUNK_TOKENS:
            weight = EMA_WEIGHT * min(1.0, rows_tokens / WHOLE_CHUNK_TOKENS)
            known = self.prefill_seconds_per_block_token
            known += weight * (min(per_block / rows_tokens, OUTLIER_FACTOR * known) - known)
            self.prefill_seconds_per_block_token = known

    def relax(self) -> bool:
        """Call this every few seconds: if no step was served since the last call, go half the way back
        to the time of a step that is alone.  Returns whether the node was idle."""
        idle = not self._served
        if idle:
            self.decode_seconds_per_block = (self.decode_seconds_per_block + self.alone) / 2
        self._served = False
        return idle

    def measured(self, seconds_per_block: float) -> None:
        """Replace the figures of decode steps by a measurement of one that ran alone.

        A figure of steps that were served stays where the measurement says about the same: their caches had
        real lengths, and this one's is short.
        """
        if self._learnt and self.alone / SAME <= seconds_per_block <= self.alone * SAME:
            return
        self.decode_seconds_per_block = self.alone = seconds_per_block
        self._learnt = False


class MeasuredSpan(Protocol):
    """The part of `node.model.blocks.span.Span` that a measurement needs.

    Any: caches of the span's own kind.
    """

    @property
    def start(self) -> int:
        """Its first block."""

    @property
    def stop(self) -> int:
        """The block after its last one."""

    @property
    def hidden_size(self) -> int:
        """Values of a hidden state."""

    def new_cache(self, batch: int, max_length: int) -> Any:
        """An empty cache of `batch` rows."""

    def forward(self, hidden: Tensor, cache: Any, position: int, start: int, stop: int, /) -> Tensor:
        """See `Span.forward`."""


def rates_at_start(span: MeasuredSpan, file: RatesFile, key: str, seconds: float = 2.0) -> Rates:
    """The kept figures where a few steps agree with them, else measured in about `seconds` and kept.

    Runs in the torch thread.
    """
    known = file.get(key)
    if known is not None:
        decode = measure_decode(span, min(CHECK_SECONDS, seconds))
        if known.alone / ABOUT_RIGHT <= decode <= known.alone * ABOUT_RIGHT:
            return known
    rates = measure_rates(span, seconds)
    file.put(key, rates)
    return rates


def measure_rates(span: MeasuredSpan, seconds: float = 2.0) -> Rates:
    """Time prefills and decode steps on zeros, for about `seconds`; medians.

    Each is run at least once, however slow.  Runs in the torch thread.
    """
    # So many tokens that two prefills are done in half of the time even if a token costs a whole step.
    step = measure_decode(span, seconds / 8)
    blocks = span.stop - span.start
    fitting, most = int(seconds / 4 / max(step * blocks, 1e-9)), MEASURED_TOKENS
    if _is_on_gpu(span):
        fitting, most = GPU_STEPS * fitting, GPU_CHUNK
    tokens = max(MIN_PREFILL_TOKENS, min(most, fitting))
    until = time.perf_counter() + seconds / 2
    prefills: list[float] = []
    while not prefills or (len(prefills) < 9 and time.perf_counter() + prefills[-1] < until):
        prefills.append(_timed(span, span.new_cache(1, tokens), tokens, 0))
    if len(prefills) > 2:
        del prefills[0]  # the first call of its shape pays for set-up
    prefill = statistics.median(prefills) / blocks / tokens
    return Rates(measure_decode(span, seconds * 3 / 8), prefill)


def measure_decode(span: MeasuredSpan, seconds: float) -> float:
    """Seconds that one decode step takes in a block, from up to `seconds` of them, at least two.

    The median, without the first, which pays for lazy set-up.  A GPU's set-up takes several steps, which do
    not count and may take any time.  Runs in the torch thread.
    """
    cache = span.new_cache(1, MEASURED_TOKENS)
    first = SET_UP_STEPS if _is_on_gpu(span) else 0
    for position in range(first):
        _timed(span, cache, 1, position)
    until = time.perf_counter() + seconds
    found = [_timed(span, cache, 1, first), _timed(span, cache, 1, first + 1)]
    while first + len(found) < MEASURED_TOKENS and time.perf_counter() + found[-1] < until:
        found.append(_timed(span, cache, 1, first + len(found)))
    return statistics.median(found[1:]) / (span.stop - span.start)


def _is_on_gpu(span: MeasuredSpan) -> bool:
    return has_own_memory(getattr(span, "device", "cpu"))  # one without a device computes here


def _timed(span: MeasuredSpan, cache: Any, tokens: int, position: int) -> float:  # Any: of the span's kind
    import torch

    hidden = torch.zeros(1, tokens, span.hidden_size)
    began = time.perf_counter()
    answer = span.forward(hidden, cache, position, span.start, span.stop)
    answer[:, -1:].cpu()  # waits until a device has computed it
    return time.perf_counter() - began


def rates_key(
    revision: Revision, device: str, dtype: str, quantize: str, threads: int, version: str = ""
) -> str:
    """The key of figures in the file.  device: as `device_name` returns it; version: of this package."""
    return "/".join((revision, device, dtype, quantize, f"{threads} threads", version))


def device_name(device: str) -> str:
    """The hardware that "cpu", "cuda:1" or "mps" stands for.  Imports torch for a GPU."""
    if kind_of(device) == "cuda":
        import torch

        return str(torch.cuda.get_device_name(index_of(device)))
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{device} {next(names, '') or platform.processor() or platform.machine()}"


@dataclass(frozen=True, slots=True)
class RatesFile:
    """Figures of earlier runs, by key.

    A file that cannot be read or written costs a measurement at every start and nothing else; the
    log says so.  Two nodes that write at once may lose one entry.
    """

    path: Path

    def get(self, key: str) -> Rates | None:
        """The figures kept for `key`, if there are any."""
        entry = self._entries().get(key)
        return None if entry is None else Rates(entry["decode"], entry["prefill"])

    def put(self, key: str, rates: Rates) -> None:
        """Keep these figures, and of all the newest MAX_KEPT."""
        entries = self._entries()
        entries.pop(key, None)
        entries[key] = {"decode": rates.alone, "prefill": rates.prefill_seconds_per_block_token}
        newest = dict(list(entries.items())[-MAX_KEPT:])  # a JSON object keeps its order
        content = json.dumps({"format": FILE_FORMAT, "rates": newest}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, content.encode())
        except OSError as error:
            log.warning("the measured rates are not kept: cannot write %s: %s", self.path, error.strerror)

    def _entries(self) -> dict[str, dict[str, float]]:
        """All sound entries, the oldest first."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
            whole = json.loads(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("the rates kept in %s are ignored: %s", self.path, error)
            return {}
        if not isinstance(whole, dict) or whole.get("format") != FILE_FORMAT:
            log.warning("the rates kept in %s are ignored: not of format %d", self.path, FILE_FORMAT)
            return {}
        entries = whole.get("rates")
        if not isinstance(entries, dict):
            log.warning("the rates kept in %s are ignored: there are none in it", self.path)
            return {}
        sound = {key: entry for key, entry in entries.items() if _is_sound(entry)}
        if len(sound) < len(entries):
            log.warning("%d of the rates kept in %s make no sense", len(entries) - len(sound), self.path)
        return sound


def _is_sound(entry: object) -> bool:
    return isinstance(entry, Mapping) and all(
        type(entry.get(name)) is float and math.isfinite(entry[name]) and 0 < entry[name] <= MAX_BLOCK_SECONDS
        for name in ("decode", "prefill")
    )
