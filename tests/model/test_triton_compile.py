"""Triton's kernels compiled for NVIDIA's cards, without one: registers, memory of a program, spilled numbers.

The arguments are those with which the operations launch them.  Needs Triton and its compiler and not its
interpreter: `make test-triton`; elsewhere these tests are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton", reason="`make test-triton` brings Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  Triton may not be there
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from node.model.cuda import attention, elementwise, product  # noqa: E402

CARDS = {"A100": 80, "H100": 90}  # their instructions for matrices differ; 8.6 and 8.9 have those of 8.0
PROCESSORS = 108
REGISTERS = 1 << 16  # of a multiprocessor
SHARED_BYTES = 99 << 10  # that one program may have where there is least: capabilities 8.6, 8.9 and 12.0
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass
class Compiled:
    kernel: str
    constants: dict[str, Any]
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    assembly: str


class NoCard:
    """A driver of a card that is not there: launches are compiled and not done."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@pytest.fixture(params=[*CARDS.values()], ids=[*CARDS])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[Compiled]:
    """What is launched while a test runs, compiled for a card."""
    launched: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        found = run(kernel, *args, grid=grid, warmup=True, **named)
        launched.append(_resources(kernel.__name__, found, named, tmp_path / "kernel.cubin"))
        return found

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (product, attention):
        monkeypatch.setattr(module, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(driver, "_active", NoCard(request.param))
    return launched


def _resources(name: str, found: Any, named: dict[str, Any], file: Path) -> Compiled:
    file.write_bytes(found.asm["cubin"])
    program = str(triton.knobs.nvidia.cuobjdump.path)
    text = subprocess.run([program, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    constants = {key: value for key, value in named.items() if key.isupper()}
    threads = 32 * found.metadata.num_warps
    stack = used["STACK"] + used["LOCAL"]
    return Compiled(name, constants, threads, used["REG"], stack, found.metadata.shared, found.asm["ptx"])


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def linear(rows: int, outs: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    bias = empty(outs, dtype=dtype) if rows % 2 else None
    weight, scale = empty(outs, width, dtype=torch.int8), empty(outs, dtype=FP32)
    return lambda: product.int8_linear(empty(rows, width, dtype=dtype), weight, scale, bias)


def paged(
    rows: int, heads: int, key_heads: int, dim: int, pages: int, dtype: torch.dtype
) -> Callable[[], object]:
    store, q = empty(1024, key_heads, dim, dtype=dtype), empty(rows, heads, dim, dtype=dtype)
    table, lengths = empty(rows, pages, dtype=torch.int32), empty(rows, dtype=torch.int32)
    return lambda: attention.paged_attention(q, store, store, table, lengths, 0.1, 0, 16)


def rope(
    heads: int, key_heads: int, dim: int, normed: bool, rotary: bool, dtype: torch.dtype
) -> Callable[[], object]:
    qkv, table = empty(2, (heads + 2 * key_heads) * dim, dtype=dtype), empty(64, dim, dtype=dtype)
    store, numbers = empty(64, key_heads, dim, dtype=dtype), empty(2, dtype=torch.int32)
    norm = empty(dim, dtype=dtype) if normed else None
    return lambda: elementwise.rope_and_write(
        qkv, heads, key_heads, table, table, numbers, numbers, store, store, norm, norm, 1e-5, rotary
    )


def between(rows: int, hidden: int, inner: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        states, weight = empty(rows, hidden, dtype=dtype), empty(hidden, dtype=dtype)
        elementwise.add_norm(states, states, weight, 1e-5)
        elementwise.norm(states, weight, 1e-5)
        elementwise.silu_mul(empty(rows, 2 * inner, dtype=dtype))

    return run


# The shapes of Llama 3 8B, of BLOOM's and SmolLM's heads, of Gemma's; widths that are no multiple of a tile.
LAUNCHES = {
    "one row": linear(1, 6144, 4096, BF16),
    "32 rows": linear(32, 6144, 4096, BF16),
    "64 rows": linear(64, 4096, 14336, BF16),
    "257 rows": linear(257, 28672, 4096, BF16),
    "one row of float16": linear(1, 28672, 4096, FP16),
    "257 rows of float16": linear(257, 28672, 4096, FP16),
    "rows of float32": linear(3, 6144, 4096, FP32),
    "part of a tile": linear(1, 1536, 576, BF16),
    "part of a large tile": linear(64, 1536, 1632, BF16),
    "an odd width": linear(65, 1536, 1541, BF16),
    "an odd width of float32": linear(3, 1536, 1541, FP32),
    "attention in parts": paged(1, 32, 8, 128, 512, BF16),
    "attention in one part": paged(64, 32, 8, 128, 64, BF16),
    "heads of 80": paged(1, 40, 40, 80, 64, FP16),
    "heads of 256": paged(1, 16, 8, 256, 64, BF16),
    "many queries for a key": paged(1, 128, 1, 64, 64, BF16),
    "float32's heads of 128": paged(1, 32, 8, 128, 64, FP32),
    "float32's heads of 256": paged(64, 16, 8, 256, 64, FP32),
    "rotary positions": rope(32, 8, 128, False, True, BF16),
    "rotary positions of normed heads": rope(16, 8, 256, True, True, FP32),
    "no rotary positions": rope(40, 40, 80, True, False, FP16),
    "between products": between(1, 4096, 14336, BF16),
    "between products of float32": between(64, 16384, 53248, FP32),
}


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_a_kernel_keeps_all_numbers_in_registers_and_fits_twice_on_a_processor(compiled, launch):
    launch()
    assert compiled
    for each in compiled:
        assert each.stack_bytes == 0, each.constants
        assert each.shared_bytes <= SHARED_BYTES
        assert 2 * each.threads * each.registers <= REGISTERS


def test_numbers_that_are_one_become_constants_of_a_program_and_may(compiled):
    linear(1, 1, 1, BF16)()
    rope(1, 1, 16, True, True, BF16)()
    between(1, 1, 1, FP16)()
    store, one = empty(16, 1, 16, dtype=BF16), torch.ones(1, 1, dtype=torch.int64)
    attention.paged_attention(empty(1, 1, 16, dtype=BF16), store, store, one, one[0], 1.0, 1, 16)
    names = ["_product", "_rope_and_write", "_add_norm", "_add_norm", "_silu_mul", "_part"]
    assert [each.kernel for each in compiled] == names


def test_a_window_and_pages_of_another_size_compile(compiled):
    q, store = empty(2, 8, 64, dtype=BF16), empty(640, 2, 64, dtype=BF16)
    table, lengths = empty(2, 80, dtype=torch.int32), empty(2, dtype=torch.int64)
    attention.paged_attention(q, store, store, table, lengths, 1.0, 1000, 8)
    assert [each.kernel for each in compiled] == ["_part", "_together"]
    assert all(each.stack_bytes == 0 for each in compiled)


@pytest.mark.parametrize("rows", [1, 64])
def test_a_product_is_computed_by_tensor_cores_and_its_weights_come_while_it_computes(compiled, rows):
    linear(rows, 6144, 4096, BF16)()
    assert {each.kernel for each in compiled} == {"_product"}
    (assembly,) = (each.assembly for each in compiled)
    assert "mma" in assembly
    assert "cp.async.wait_group" in assembly


def test_one_and_two_rows_are_one_program(compiled):
    linear(1, 6144, 4096, BF16)()
    linear(3, 6144, 4096, BF16)()
    assert compiled[0].assembly == compiled[1].assembly
