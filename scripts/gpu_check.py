"""The code for GPUs, checked and timed on a machine with one: see gpu_check.sh.

    python scripts/gpu_check.py [SECTION ...] [--device cuda:1] [--small]

Each section runs in a process of its own within its own time, so that one that hangs costs only itself.  A
section prints a line for each thing that it found, and adds it as JSON to $OUT/gpu_check.jsonl; a failure
is such a line too, with "FAILED" in its name, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.compute.shapes import shape_folder, timed  # noqa: E402
from benchmarks.lib.memory_reader import MemoryReader  # noqa: E402
from node.config import LLM_INT8  # noqa: E402
from node.devices import (  # noqa: E402
    find_device,
    free_device_bytes,
    has_own_memory,
    index_of,
    kind_of,
    set_up_allocator,
    synchronize,
    use_device,
)
from tensor_codec.span_spec import QUANTIZE  # noqa: E402

# Seconds of each section; all together are less than eight minutes.
SECTIONS: Mapping[str, int] = {
    "env": 20,
    "correct": 70,
    "families": 45,
    "speed": 90,
    "linear": 35,
    "attention": 35,
    "count": 35,
    "memory": 35,
    "pytest": 45,
    "swarm": 65,
}
CPU_TIMES = 4  # as much, where a CPU stands for the card and computes for all processes of a section
TESTS = (
    "tests/model/test_graphs.py",
    "tests/model/test_device_steps.py",
    "tests/model/test_experts_on_a_device.py",
    *(
        f"tests/model/test_quantize.py::test_{name}"
        for name in (
            "a_product_on_a_device_is_one_operation_and_has_a_derivative",
            "what_is_computed_on_a_device_may_be_written_into",
            "layers_of_bitsandbytes_on_a_device_stand_side_by_side_unmerged",
            "nf4_is_bitsandbytes_four_bits",
        )
    ),
)
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
BF16 = torch.bfloat16
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative to the CPU's float32.  int8 has 8 bits of a row's largest value, nf4 has 4 of 64 values'.
TOLERANCES = {"float32 none": 1e-5, "bfloat16 none": 2e-2, "float16 none": 5e-3, "int8": 6e-2, "nf4": 0.35}


@dataclass(slots=True)
class Check:
    """One section's run.  out: the file of results."""

    section: str
    device: str
    small: bool
    out: Path
    failures: int = field(default=0, init=False)

    @property
    def cuda(self) -> bool:
        """Whether it is CUDA's (or ROCm's) device."""
        return kind_of(self.device) == "cuda"

    def say(self, what: str, **facts: Any) -> None:  # Any: JSON
        """Print a finding, and keep it."""
        shown = (
            f"{name}={fact:.4g}" if isinstance(fact, float) else f"{name}={fact}"
            for name, fact in facts.items()
        )
        print(self.section, what, *shown, flush=True)
        kept = {
            name: fact if isinstance(fact, int | float | str | list) else str(fact)
            for name, fact in facts.items()
        }
        with self.out.open("a") as file:
            file.write(json.dumps({"section": self.section, "what": what, **kept}) + "\n")

    def expect(self, what: str, holds: bool, **facts: Any) -> None:
        """Say whether something holds that must."""
        self.failures += not holds
        self.say(what if holds else f"{what} FAILED", **facts)

    @contextlib.contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Go on after any error of the block, with a line about it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever is wrong is a finding
            self.failures += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            text = (str(error).splitlines() or [""])[0][:200]
            self.say(f"{what} FAILED", error=f"{type(error).__name__}: {text}", at=where)

    def milliseconds(self, work: Callable[[], object], times: int = 20, warm: int = 3) -> float:
        """The median of a call, with a synchronisation around each."""
        for _ in range(warm):
            work()
        count = 3 if self.small else times
        return statistics.median(timed(work, self.device) for _ in range(count)) * 1e3

    def graph_milliseconds(self, work: Callable[[], object], times: int = 50) -> float:
        """Of a call in a CUDA graph: without the gaps of launches by the CPU."""
        if not self.cuda:
            return self.milliseconds(work, 3, 1)
        side: Any = cast(Any, torch.cuda).Stream()  # Any: torch has no types for it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()

        def replays() -> None:
            for _ in range(times):
                graph.replay()

        return timed(replays, self.device) / times * 1e3

    # --- spans and sessions ---

    def span(
        self, blocks: int, dtype: torch.dtype = BF16, quantize: str = "none", device: str | None = None
    ) -> Any:
        """So many random blocks in the shapes of Llama-3-8B.  Any, here and below: imported late."""
        from node.model.blocks.span import load_span

        name = "small-llama" if self.small else "llama-3-8b"
        folder = shape_folder(name, 8 if not self.small else 2, self.device)
        return load_span(folder, 0, blocks, dtype=dtype, device=device or self.device, quantize=quantize)


def kernels() -> Any:
    """Our operations for GPUs."""
    return importlib.import_module("node.model.cuda.ops")


def rel(found: Tensor, right: Tensor) -> float:
    """The distance of two tensors, as a share of the second one's norm."""
    a, b = found.float().cpu(), right.float().cpu()
    return float((a - b).norm() / b.norm())


def sessions(span: Any, lengths: Sequence[int], room: int = 66) -> tuple[Any, list[Any]]:
    """A pool, and a cache of each length in it, full of zeros."""
    pool = span.new_arena(sum(-(-(length + room) // 16) * 16 for length in lengths), max(lengths) + room)
    if hasattr(span, "record"):
        span.record(pool)
    caches = []
    for length in lengths:
        cache = pool.open(1, length + room)
        cache.reserve(length)
        cache.length = length
        caches.append(cache)
    return pool, caches


def step(span: Any, caches: Sequence[Any], hidden: Tensor, start: int | None = None) -> Tensor:
    """One position of each session, on the CPU."""
    for cache in caches:
        cache.reserve(cache.length + 1)
    answer = span.decode(hidden, caches, span.start if start is None else start, span.stop).cpu()
    for cache in caches:
        cache.length += 1
    return cast(Tensor, answer)


def _steps(span: Any, caches: Sequence[Any], hidden: Tensor, count: int) -> None:
    for _ in range(count):
        step(span, caches, hidden)


# --- the sections ---


def env(check: Check) -> None:
    """Versions, the device, and the rates at which it copies and reads: the floor of everything else."""
    packages = {}
    for name in ("torch", "triton", "transformers", "bitsandbytes", "trio", "libp2p", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    check.say("versions", python=sys.version.split()[0], **packages)
    check.say("compiler", cc=shutil.which("gcc") or shutil.which("cc") or "none")
    if check.cuda:
        found = torch.cuda.get_device_properties(index_of(check.device) or 0)
        check.say(
            "device", name=found.name, sms=found.multi_processor_count,
            capability=f"{found.major}.{found.minor}", free_mib=free_device_bytes(check.device) >> 20,
            cuda=str(torch.version.cuda), hip=str(torch.version.hip),
        )  # fmt: skip
    with check.tried("kernels"):
        usable = bool(kernels().usable(torch.device(check.device)))
        check.expect("Triton's kernels can be used", usable or not check.cuda, usable=usable)
    rate = MemoryReader(check.device, 1 << 22 if check.small else None).bytes_per_second()
    check.say("read", tb_per_s=rate / 1e12)


def correct(check: Check) -> None:
    """Every way to keep the weights against float32 on the CPU: prefill, chunks, decode, gradients."""
    torch.manual_seed(0)
    blocks = 2
    right = check.span(blocks, torch.float32, device="cpu")
    given = torch.randn(3, 40, right.hidden_size) * 0.5
    expected = _walk(right, given)
    ways = [("float32", "none"), ("bfloat16", "none"), ("float16", "none")]
    ways += [("bfloat16", kind) for kind in QUANTIZE if kind != "none"] + [("float16", "int8")]
    if check.cuda:
        ways.append(("bfloat16", LLM_INT8))
    for dtype, quantize in ways:
        with check.tried(f"{dtype} {quantize}"):
            span = check.span(blocks, FLOATS[dtype], quantize)
            found = _walk(span, given)
            worst = max(rel(one, two) for one, two in zip(found, expected, strict=True))
            kind = f"{dtype} none" if quantize == "none" else "int8" if "int8" in quantize else quantize
            check.expect(
                f"{dtype} {quantize}", worst <= TOLERANCES[kind], worst=worst, allowed=TOLERANCES[kind],
                fused=span.fused, prefill=rel(found[0], expected[0]), chunk=rel(found[1], expected[1]),
                decode=rel(found[-1], expected[-1]),
            )  # fmt: skip
    with check.tried("sessions that join at another block"):
        _mixed(check, check.span(blocks))
    with check.tried("backward"):
        _backward(check, right)


def families(check: Check) -> None:
    """Every supported architecture, tiny and random, in float32: the device's answers next to the CPU's.

    Those whose int8 experts are layers of their own in int8, too.
    """
    from node.model.blocks.span import load_span
    from node.model.checkpoint.folder import HashMemo, open_folder
    from tests.model_fixtures import TINY, save_tiny

    with tempfile.TemporaryDirectory() as folder:
        memo = HashMemo(Path(folder) / "hashes.json")
        for name, quantize in [*((name, "none") for name in TINY), *((name, "int8") for name in EXPERTS)]:
            what = name if quantize == "none" else f"{name} {quantize}"
            with check.tried(what):
                save_tiny(name, Path(folder) / name)
                model = open_folder(Path(folder) / name, memo=memo)
                right, span = (
                    load_span(model, 0, 2, device=each, quantize=quantize) for each in ("cpu", check.device)
                )
                given = torch.randn(3, 40, right.hidden_size, generator=torch.Generator().manual_seed(0))
                pairs = zip(_walk(span, given), _walk(right, given), strict=True)
                worst = max(rel(one, two) for one, two in pairs)
                most = 1e-4 if quantize == "none" else 2e-2  # a CPU rounds rows to 16 bits next to int8
                check.expect(what, worst <= most, worst=worst, fused=span.fused)


def _walk(span: Any, given: Tensor) -> list[Tensor]:
    """What three sessions of different lengths answer: two chunks of each, then steps of all together."""
    pool, found = span.new_arena(256, 64), []
    caches = [pool.open(1, 40) for _ in range(3)]
    if hasattr(span, "record"):
        span.record(pool)
    for index, cache in enumerate(caches):
        row, first = given[index : index + 1], 20 + index
        found.append(span.forward(row[:, :first], cache, 0)[0, -1])
        found.append(span.forward(row[:, first : first + 10], cache, first)[0, -1])
    for number in range(5):
        found.append(step(span, caches, given[:, 30 + number]).flatten())
    return [one.float().cpu() for one in found]


def _mixed(check: Check, span: Any) -> None:
    """A batch with a session of all blocks and one of the last block alone, as the engine runs it."""
    from node.serving.executor.engine import Engine
    from node.serving.executor.jobs import Job, Kind
    from node.serving.executor.rates import Rates
    from tensor_codec.messages.contract import StepRange

    _, caches = sessions(span, [20, 24])
    steps = [
        SimpleNamespace(
            job=Job(number, "p", Kind.DECODE, 1, 1, start, span.stop),
            contract=SimpleNamespace(batch=1, start=start, stop=span.stop),
            cache=cache,
            what=StepRange(cache.length, 1, "all"),
            adapter=None,
        )
        for number, (start, cache) in enumerate(zip((0, 1), caches, strict=True))
    ]
    given = torch.randn(2, span.hidden_size)
    alone = []
    for number, (start, cache) in enumerate(zip((0, 1), caches, strict=True)):
        cache.reserve(cache.length + 1)
        alone.append(span.decode(given[number : number + 1], [cache], start, span.stop).float().cpu())
    engine = Engine(span, cast(Any, None), Rates(1.0, 1.0))
    answer = engine._decode(cast(Any, steps), given).float().cpu()
    distance = rel(answer, torch.cat(alone))
    check.expect("sessions that join at another block", distance <= 0.03, rel=distance)


def _backward(check: Check, right: Any) -> None:
    """Gradients of a loss through the blocks, next to those of the CPU."""
    from node.model.blocks.forward_backward import backward_in_parts, finish

    given, grad = torch.randn(2, 2, 16, right.hidden_size).unbind()
    (expected, *_) = finish(backward_in_parts(right, given, grad, 0, right.stop))
    for quantize in ("none", "int8"):
        with check.tried(f"backward {quantize}"):
            span = check.span(right.stop, BF16, quantize)
            (found, *_) = finish(backward_in_parts(span, given, grad, 0, span.stop))
            distance = rel(found, expected)
            check.expect(f"backward {quantize}", distance <= 0.1, rel=distance)


def speed(check: Check) -> None:
    """Decode steps and prefills next to the floor; of 32 blocks a step takes four times as long."""
    blocks, rate = (
        (2 if check.small else 8),
        MemoryReader(check.device, 1 << 22 if check.small else None).bytes_per_second(),
    )
    for quantize in ("int8", "none", "nf4"):
        with check.tried(quantize):
            began = time.perf_counter()
            span = check.span(blocks, BF16, quantize)
            synchronize(check.device)
            seconds, floor = time.perf_counter() - began, span.nbytes / rate * 1e3
            check.say(f"{quantize} load", seconds=seconds, weights_mib=span.nbytes >> 20, fused=span.fused)
            for rows, length in ((1, 100), (4, 100), (16, 100), (64, 100), (1, 1000), (16, 1000), (1, 8000)):
                if not check.small or length < 1000:
                    _decode_speed(check, span, quantize, (rows, length), floor)
            _prefill_speed(check, span, quantize)
            del span
            gc.collect()


def _decode_speed(check: Check, span: Any, quantize: str, size: tuple[int, int], floor: float) -> None:
    rows, length = size
    _, caches = sessions(span, [length - number % 16 for number in range(rows)])
    hidden = torch.randn(rows, span.hidden_size)
    found = [
        timed(lambda: step(span, caches, hidden), check.device) * 1e3 for _ in range(6 if check.small else 24)
    ]
    median = statistics.median(found[3:])
    check.say(
        f"{quantize} decode", rows=rows, length=length, first=found[0], second=found[1], median=median,
        worst=max(found[3:]), share_of_floor=floor / median, tokens_per_s=rows * 1e3 / median,
    )  # fmt: skip


def _prefill_speed(check: Check, span: Any, quantize: str) -> None:
    from node.serving.executor.rates import measure_rates

    rates = measure_rates(span, 0.2 if check.small else 1.0)
    check.say(
        f"{quantize} rates", decode_ms_block=rates.alone * 1e3,
        prefill_us_block_token=rates.prefill_seconds_per_block_token * 1e6,
    )  # fmt: skip
    for tokens in (32,) if check.small else (256, 1024):
        cache = span.new_arena(4096, 4096).open(1, 4096)
        hidden = torch.randn(1, tokens, span.hidden_size)
        one = check.milliseconds(partial(_chunk, span, cache, hidden, 0), 5)
        two = check.milliseconds(partial(_chunk, span, cache, hidden, tokens), 5)
        check.say(f"{quantize} prefill", tokens=tokens, first_chunk_ms=one, second_chunk_ms=two)


def _chunk(span: Any, cache: Any, hidden: Tensor, first: int) -> None:
    """The chunk at `first` of a prompt."""
    cache.cut(first)
    span.forward(hidden, cache, first)


def linear(check: Check) -> None:
    """One matrix, its copies in turn so that no cache holds them: each way's rate of reading weights."""
    ins, outs = (256, 512) if check.small else (4096, 28_672)
    copies = 4 if check.cuda else 1
    weights = [torch.randn(outs, ins, device=check.device).to(BF16) / 64 for _ in range(copies)]
    scales = [weight.float().abs().amax(1) / 127 for weight in weights]
    codes = [
        (weight.float() / scale[:, None]).round().to(torch.int8)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    ways = _ways(check, weights, codes, scales)
    for rows in (1, 16, 64, 256):
        given = torch.randn(rows, ins, device=check.device).to(BF16)
        right = given.float() @ (codes[0].float() * scales[0][:, None]).t()
        for name, (size, work) in ways.items():
            with check.tried(f"{name}, {rows} rows"):
                distance = rel(work(given, 0), right)
                eager, graph = _times(check, name, partial(_each, work, given, copies))
                check.say(
                    name, rows=rows, rel=distance, eager_us=eager / copies * 1e3,
                    graph_us=graph / copies * 1e3, gb_per_s=copies * size * ins * outs / graph / 1e6,
                )  # fmt: skip


def _each(work: Callable[[Tensor, int], Tensor], given: Tensor, copies: int) -> None:
    for at in range(copies):
        work(given, at)


def _times(check: Check, name: str, work: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds as it is called, and in a graph; a way that waits for the device cannot be recorded."""
    eager = check.milliseconds(work, 10)
    try:
        return eager, check.graph_milliseconds(work)
    except RuntimeError as error:
        check.say(f"{name} is not recorded", error=str(error).splitlines()[0][:120])
        synchronize(check.device)
        return eager, eager


Way = tuple[float, Callable[[Tensor, int], Tensor]]  # bytes of a weight, and the product with copy `at`


def _ways(
    check: Check, weights: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> dict[str, Way]:
    product = torch.nn.functional.linear
    ways: dict[str, Way] = {
        "bfloat16, cuBLAS": (2, lambda given, at: product(given, weights[at])),
        "int8, unpacked for cuBLAS": (
            1,
            lambda given, at: product(given, codes[at].to(BF16) * scales[at].to(BF16)[:, None]),
        ),
    }
    with check.tried("our own int8"):
        int8_linear = kernels().int8_linear

        def ours(way: str) -> Callable[[Tensor, int], Tensor]:
            return lambda given, at: cast(Tensor, int8_linear(given, codes[at], scales[at], None, way))

        ways |= {f"int8, {way}": (1, ours(way)) for way in ("triton", "dequantise")}
    with check.tried("bitsandbytes"):
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        outs, ins = weights[0].shape
        layers = []
        for code, scale in zip(codes, scales, strict=True):
            layer = Linear8bitLt(ins, outs, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            layer.weight = Int8Params(
                code, requires_grad=False, has_fp16_weights=False, CB=code, SCB=scale * 127
            )
            layers.append(layer.eval())
        ways["int8, bitsandbytes"] = (1, lambda given, at: layers[at](given))
    return ways


def attention(check: Check) -> None:
    """One block's attention of a decode step over pages, and of a prompt's second chunk."""
    heads, key_heads, dim = (8, 2, 32) if check.small else (32, 8, 128)
    sizes = ((1, 256), (4, 64)) if check.small else ((1, 1024), (16, 1024), (16, 4096), (1, 8192))
    for rows, length in sizes:
        _over_pages(check, rows, length, (heads, key_heads, dim))
    _second_chunk(check, heads, key_heads, dim)


def _over_pages(check: Check, rows: int, length: int, shape: tuple[int, int, int]) -> None:
    heads, key_heads, dim = shape
    keys = torch.randn(rows * length, key_heads, dim, device=check.device).to(BF16)
    values = torch.randn_like(keys)
    query = torch.randn(rows, heads, dim, device=check.device).to(BF16)
    lengths = torch.randint(length // 2, length, (rows,), dtype=torch.int32).to(check.device)
    pages = torch.arange(rows * length // 16, dtype=torch.int32, device=check.device).view(rows, -1)
    right = _gathered(query, keys, values, lengths)
    read = 2 * int(lengths.sum()) * key_heads * dim * 2

    def gathered() -> Tensor:
        return _gathered(query, keys, values, lengths)

    def paged() -> Tensor:
        return cast(Tensor, kernels().paged_attention(query, keys, values, pages, lengths, dim**-0.5))

    size = {"rows": rows, "length": length}
    with check.tried("gathered"):
        took = check.graph_milliseconds(gathered)
        check.say("gathered", **size, graph_us=took * 1e3, gb_per_s=read / took / 1e6)
    with check.tried("our own"):
        took, distance = check.graph_milliseconds(paged), rel(paged(), right.flatten(1))
        check.expect(
            "our own", distance < 2e-2, **size, rel=distance, graph_us=took * 1e3, gb_per_s=read / took / 1e6
        )


def _gathered(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """By torch's own attention, over all slots of each row: [rows, heads, dim]."""
    rows, heads, dim = query.shape
    key_heads = keys.shape[1]
    k, v = (each.view(rows, -1, key_heads, dim).transpose(1, 2) for each in (keys, values))
    seen = torch.arange(k.shape[2], device=query.device) < lengths[:, None]
    grouped = query.view(rows, key_heads, heads // key_heads, dim)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None])
    return found.reshape(rows, heads, dim)


def _second_chunk(check: Check, heads: int, key_heads: int, dim: int) -> None:
    """A mask against a lower right triangle, at lengths of which each is new."""
    from torch.nn.attention.bias import causal_lower_right

    attend = torch.nn.functional.scaled_dot_product_attention
    chunk = 16 if check.small else 256
    query = torch.randn(1, heads, chunk, dim, device=check.device).to(BF16)
    for length in (64,) if check.small else (512, 4096, 4097, 4098):
        k, v = (torch.randn(1, key_heads, length, dim, device=check.device).to(BF16) for _ in range(2))
        places = torch.arange(length - chunk, length, device=check.device)
        seen = torch.arange(length, device=check.device) <= places[:, None]
        for name, mask in (("mask", seen), ("causal_lower_right", causal_lower_right(chunk, length))):
            with check.tried(f"second chunk, {name}"):
                work = partial(attend, query, k, v, attn_mask=mask, enable_gqa=True)
                first = timed(work, check.device) * 1e3
                check.say(f"second chunk, {name}", length=length, first_ms=first, ms=check.milliseconds(work))


def count(check: Check) -> None:
    """What the profiler sees of a step: launches, copies, waits."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if check.cuda else [])
    calls = (
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch",
        "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaMalloc",
    )  # fmt: skip
    for quantize in ("none", "int8", "nf4"):
        with check.tried(quantize):
            span = check.span(2, BF16, quantize)
            _, caches = sessions(span, [100, 90, 80])
            hidden = torch.randn(3, span.hidden_size)
            for _ in range(4):
                step(span, caches, hidden)
            with profile(activities=activities) as found:
                step(span, caches, hidden)
                synchronize(check.device)
            counts = {event.key: event.count for event in found.key_averages()}
            check.say(f"{quantize} step", **{name: counts.get(name, 0) for name in calls})
            if not check.cuda:
                continue
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(span, caches, hidden)
            torch.cuda.set_sync_debug_mode("default")
            fused = quantize != "nf4"
            check.expect(
                f"{quantize} waits", not fused or len(caught) <= 1, count=len(caught)
            )  # the answer's copy


def memory(check: Check) -> None:
    """The memory of batches with one long session: nothing of the size of rows times the longest."""
    span = check.span(2)
    for rows, length in (
        ((4, 64),) if check.small else ((1, 100), (16, 1000), (64, 1000), (16, 8000), (64, 8000))
    ):
        with check.tried(f"{rows} x {length}"):
            _, caches = sessions(span, [length] + [100] * (rows - 1))
            hidden = torch.randn(rows, span.hidden_size)
            before = _reserved(check)
            seconds = timed(partial(_steps, span, caches, hidden, 3), check.device)
            more = _reserved(check) - before
            check.expect(
                "a ragged batch", more < 1024, rows=rows, longest=length, seconds=seconds, more_mib=more
            )
    if has_own_memory(check.device):
        with check.tried("more than there is"):
            _shortage(check)
        check.say("free", mib=free_device_bytes(check.device) >> 20)


def _reserved(check: Check) -> int:
    """MiB that torch has held at the most."""
    return torch.cuda.max_memory_reserved(index_of(check.device)) >> 20 if check.cuda else 0


def _shortage(check: Check) -> None:
    """Torch's error is known as what it is, and memory is there again afterwards."""
    from node.devices import empty_cache, is_out_of_memory

    try:
        torch.empty(1 << 50, dtype=torch.uint8, device=check.device)
    except RuntimeError as error:
        check.expect("more than there is", is_out_of_memory(error), error=type(error).__name__)
    empty_cache()


def pytest(check: Check) -> None:
    """The tests of the parts that differ on a GPU, under this machine's packages."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={check.out.parent}/pytest", *TESTS, "-x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    check.expect("tests", done.returncode == 0, last=last)


def swarm(check: Check) -> None:
    """Two nodes on the device, in two processes, and a client: the tokens of the whole model."""
    from benchmarks.lib.processes import local_swarm
    from tests.model_fixtures import save_tiny, save_tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny-llama"
        whole: Any = save_tiny("llama", path)
        save_tiny_tokenizer(path)
        blocks = whole.config.num_hidden_layers
        flags = ["--threads", "1", "--device", check.device, "--cache-tokens", "4096"]
        for kept in (["--dtype", "float32", "--quantize", "none"], ["--quantize", "int8"]):
            with check.tried(f"swarm {' '.join(kept)}"), local_swarm([*flags, *kept]) as nodes:
                cut = blocks // 2
                for run in (f"0:{cut}", f"{cut}:{blocks}"):
                    nodes.start(str(path), "--blocks", run).wait_online()
                _generated(check, whole, path, nodes.peers, exact="float32" in kept)


def _generated(check: Check, whole: Any, path: Path, peers: Sequence[str], *, exact: bool) -> None:
    """Tokens of the swarm, by ends on the CPU and on the device.  exact: they must be the whole model's."""
    from transformers import AutoTokenizer

    prompt, new = "the quick brown fox", 24
    ids = torch.tensor([AutoTokenizer.from_pretrained(path)(prompt)["input_ids"]])
    with torch.inference_mode():
        right = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    for ends in dict.fromkeys(("cpu", check.device)):
        done = subprocess.run(
            [
                sys.executable, "-m", "client", "generate", prompt, "--json", "--greedy",
                "--model", str(path), "--max-new-tokens", str(new), "--threads", "1",
                "--device", ends, "--dtype", "float32",
                *(word for peer in peers for word in ("--peers", peer)),
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            check.expect("tokens", False, ends=ends, error=done.stderr.strip()[-200:])
            continue
        answer = json.loads(done.stdout)
        expected = right[0, ids.shape[1] :].tolist()[: len(answer["tokens"])]
        same = sum(one == two for one, two in zip(answer["tokens"], expected, strict=False))
        count = len(answer["tokens"])
        check.expect(
            "tokens", count > 0 and (same == count or not exact), ends=ends, exact=exact, same=same, of=count,
            tokens_per_s=float(answer["tokens_per_s"]),
        )  # fmt: skip


RUN: Mapping[str, Callable[[Check], None]] = {
    "env": env, "correct": correct, "families": families, "speed": speed, "linear": linear,
    "attention": attention, "count": count, "memory": memory, "pytest": pytest, "swarm": swarm,
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes: whether the script runs, on any machine"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if unknown := set(flags.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: {', '.join(SECTIONS)} are there")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 0 if nothing failed."""
    flags = parse(arguments)
    out = Path(os.environ.get("OUT", tempfile.gettempdir())) / "gpu_check.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    if flags.inside:
        be_quiet()
        check = Check(flags.sections[0], find_device(flags.device), flags.small, out)
        use_device(check.device)
        guard = contextlib.nullcontext() if check.section == "correct" else torch.inference_mode()
        with check.tried(check.section), guard:
            RUN[check.section](check)
        return min(check.failures, 1)
    failed = []
    for section in flags.sections or SECTIONS:
        if not passes(section, flags, out):
            failed.append(section)
    print("failed:", ", ".join(failed) if failed else "nothing", flush=True)
    return 1 if failed else 0


def be_quiet() -> None:
    """Leave the terminal to the findings."""
    from transformers.utils import logging as library

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    library.disable_progress_bar()
    library.set_verbosity_error()


def passes(section: str, flags: argparse.Namespace, out: Path) -> bool:
    """Run a section in a process of its own, within its time."""
    words = [sys.executable, __file__, section, "--inside", "--device", flags.device]
    words += ["--small"] if flags.small else []
    seconds = SECTIONS[section] * (CPU_TIMES if kind_of(flags.device) == "cpu" else 1)
    process = subprocess.Popen(words, start_new_session=True)  # with its nodes, which end with it
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        Check(section, flags.device, flags.small, out).say("FAILED", error=f"not done within {seconds} s")
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    set_up_allocator()
    sys.exit(main())
