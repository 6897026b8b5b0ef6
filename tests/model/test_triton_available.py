"""A node serves without Triton, and with kernels that fail or are wrong: torch computes then."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from node.model.cuda import available, ops, torch_ops
from node.model.cuda.launches import Kernel

CPU, CARD = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, dict[str, Kernel]]:
    """What is known of devices: nothing yet."""
    fresh: dict[torch.device, dict[str, Kernel]] = {}
    monkeypatch.setattr(available, "_found", fresh)
    return fresh


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_probed", lambda device: pytest.fail("no kernel is tried for a CPU"))


def probe(monkeypatch: pytest.MonkeyPatch, result: Callable[[], object]) -> list[torch.device]:
    """Answer `result` for a card; the cards that were tried."""
    tried: list[torch.device] = []

    def probed(device: torch.device) -> object:
        tried.append(device)
        return result()

    monkeypatch.setattr(available, "_probed", probed)
    return tried


def raising(error: Exception) -> Callable[..., object]:
    def fail(*args: object) -> object:
        raise error

    return fail


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_cpu_loads_no_kernel_and_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(available, "INTERPRETED", False)
    assert available.kernel_of("norm", CPU) is None
    assert not ops.usable("cpu")
    assert lines(caplog) == []


def test_without_a_compiler_a_card_computes_with_torch_and_the_log_has_one_line(caplog, monkeypatch):
    error = RuntimeError("In file included from main.c\nFailed to find C compiler. Please specify via CC")
    tried = probe(monkeypatch, raising(error))
    assert [available.kernel_of(name, CARD) for name in ("norm", "silu_mul", "norm")] == [None] * 3
    assert not available.usable(CARD)
    assert tried == [CARD]
    (line,) = lines(caplog)
    assert "cuda:1" in line
    assert line.endswith("Failed to find C compiler. Please specify via CC")


def test_an_error_without_a_text_has_its_name_in_the_log(caplog, monkeypatch):
    probe(monkeypatch, raising(NotImplementedError()))
    assert not available.usable(CARD)
    assert lines(caplog)[0].endswith("NotImplementedError")


def test_only_the_kernels_that_are_right_are_used(caplog, monkeypatch):
    kernels = {"norm": lambda: 1, "silu_mul": lambda: 2}
    probe(monkeypatch, lambda: (kernels, {"norm": "its numbers are wrong"}))
    assert available.kernel_of("silu_mul", CARD) is kernels["silu_mul"]
    assert available.kernel_of("norm", CARD) is None
    assert available.usable(CARD)
    (line,) = lines(caplog)
    assert "norm" in line
    assert "its numbers are wrong" in line


def test_a_lack_of_memory_says_nothing_about_the_kernels(caplog, monkeypatch):
    probe(monkeypatch, raising(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        available.kernel_of("norm", CARD)
    probe(monkeypatch, lambda: ({"norm": len}, {}))
    assert available.kernel_of("norm", CARD) is len
    assert lines(caplog) == []


def test_a_kernel_that_fails_in_a_later_size_is_given_up_and_the_answer_is_torchs(caplog, found):
    calls = []

    def fails(*args: Tensor) -> Tensor:
        calls.append(args)
        raise RuntimeError("out of resource: shared memory, Required: 120000, Hardware limit: 101376")

    found[CPU] = {"silu_mul": fails, "norm": torch_ops.norm}
    gate_up = torch.randn(3, 10)
    for _ in range(2):
        assert torch.equal(ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up))
    assert len(calls) == 1
    assert list(found[CPU]) == ["norm"]
    (line,) = lines(caplog)
    assert "silu_mul" in line
    assert "Hardware limit" in line


def test_a_kernel_that_finds_no_memory_is_kept(caplog, found):
    found[CPU] = {"silu_mul": raising(torch.OutOfMemoryError("no memory"))}
    with pytest.raises(torch.OutOfMemoryError):
        ops.silu_mul(torch.randn(3, 10))
    assert "silu_mul" in found[CPU]
    assert lines(caplog) == []
