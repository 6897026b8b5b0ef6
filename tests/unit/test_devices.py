"""A device by its name: what the command line takes, what is there, which of torch's calls get its number."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from node import devices, main
from node.config import ConfigError, NetworkConfig, NodeConfig
from node.model.checkpoint.architecture import ARCHITECTURES, OVERFLOW_FLOAT16
from node.runtime.arguments import device as device_argument
from node.runtime.arguments import devices as devices_argument
from node.serving import memory, served_span
from node.serving.executor import batcher, rates


class FakeCuda:
    """Torch's calls about GPUs.  count: of them.  bfloat16: whether they compute in it.  asked: by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2, *, bfloat16: bool = True) -> None:
        self.current, self.asked, self.emptied = 0, list[tuple[str, int]](), 0
        self.synchronized: list[int] = []

        def of(index: int | None) -> int:
            return self.current if index is None else index

        def noted(what: str, index: int | None, value: Any) -> Any:
            self.asked.append((what, of(index)))
            return value

        def emptied() -> None:
            self.emptied += 1

        fakes: dict[str, Any] = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "set_device": lambda index: setattr(self, "current", index),
            "is_bf16_supported": lambda including_emulation=True: including_emulation or bfloat16,
            "mem_get_info": lambda index=None: noted("free", index, ((1 + of(index)) * 1000, 9000)),
            "memory_reserved": lambda index=None: noted("reserved", index, 300),
            "memory_allocated": lambda index=None: noted("allocated", index, 100),
            "get_device_name": lambda index=None: noted("name", index, f"GPU {of(index)}"),
            "empty_cache": emptied,
            "synchronize": lambda index=None: self.synchronized.append(of(index)),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:15", "mps"])
def test_names_of_devices_are_taken_everywhere(name):
    assert devices.device_named(name) == device_argument(name) == name
    assert NodeConfig(NetworkConfig(), device=name).device == name


@pytest.mark.parametrize(
    "name",
    ["xpu", "xpu:0", "gpu", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "CUDA", "cuda:1 ", " cuda", "cpu:0",
     "mps:0", "cuda:1000", "cuda:١", "cuda\n", "", None, 1, torch.device("cuda")],
    ids=repr,
)  # fmt: skip
def test_other_names_are_refused_with_those_that_are_allowed(name):
    with pytest.raises(ConfigError, match="one of auto, cpu, cuda, mps is allowed") as caught:
        NodeConfig(NetworkConfig(), device=name)
    assert "cuda:1" in str(caught.value)
    if isinstance(name, str):
        with pytest.raises(argparse.ArgumentTypeError, match="is allowed"):
            device_argument(name)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("cpu", ("cpu",)),
        ("auto", ("auto",)),
        ("cpu,cpu,cpu", ("cpu",) * 3),
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        ("cuda,cuda:2", ("cuda:0", "cuda:2")),
        ("cuda:3,cuda:0", ("cuda:3", "cuda:0")),
    ],
)
def test_a_list_of_devices_is_gpus_by_number_or_the_cpu(names, found):
    assert devices.devices_named(names) == found
    assert NodeConfig(NetworkConfig(), device=names).devices == found
    assert devices_argument(names) == ",".join(found)


@pytest.mark.parametrize(
    "names",
    [
        "cuda:0,cuda:0",
        "cuda,cuda:0",
        "cuda:0,cpu",
        "auto,auto",
        "mps,mps",
        ",".join(["cpu"] * 65),
        "cpu," * 999,
    ],
    ids=lambda names: names[:20],
)
def test_other_lists_are_refused_with_what_is_allowed(names):
    with pytest.raises(ConfigError, match=r"allowed|a list may have up to 64 GPUs") as caught:
        NodeConfig(NetworkConfig(), device=names)
    assert len(str(caught.value)) < 300
    with pytest.raises(argparse.ArgumentTypeError):
        devices_argument(names)


@pytest.mark.parametrize(
    ("device", "ranks", "found"),
    [
        ("auto", 2, ("cuda:0", "cuda:1")),
        ("cuda", 3, ("cuda:0", "cuda:1", "cuda:2")),
        ("cuda:2,cuda:0", 2, ("cuda:2", "cuda:0")),
        ("cpu", 3, ("cpu",) * 3),
        ("cuda:2", 1, ("cuda:2",)),
        ("cuda:2,cuda:1", 1, ("cuda:2", "cuda:1")),
    ],
)
def test_ranks_have_the_devices_that_are_named_or_the_first_ones(monkeypatch, device, ranks, found):
    cuda = FakeCuda(monkeypatch, 3)
    config = NodeConfig(NetworkConfig(), device=device, tensor_parallel=ranks)
    assert main._devices_and_dtype(config)[0] == found
    if found[0] != "cpu":
        assert f"cuda:{cuda.current}" == found[0]


@pytest.mark.parametrize(
    ("device", "ranks", "said"),
    [
        ("auto", 4, "4 ranks need 4 devices, cuda:0, cuda:1, cuda:2 are there"),
        ("cuda:1", 2, "2 ranks need 2 devices, cuda:1 is one"),
        ("cuda:0,cuda:7", 2, "device cuda:7 is not there"),
        ("cuda:0,cuda:7", 1, "device cuda:7 is not there"),
    ],
)
def test_devices_that_are_not_there_are_named(monkeypatch, device, ranks, said):
    FakeCuda(monkeypatch, 3)
    with pytest.raises(ConfigError, match=said):
        main._devices_and_dtype(NodeConfig(NetworkConfig(), device=device, tensor_parallel=ranks))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tensor_parallel": 3, "device": "cpu,cpu"}, "tensor_parallel is 3, device names 2 devices"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"tensor_parallel": 65}, "tensor_parallel is 65"),
        ({"tensor_parallel": True}, "tensor_parallel"),
        ({"tensor_parallel": 2, "adapters": ("folder",)}, "adapters are given"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(how, said):
    with pytest.raises(ConfigError, match=said):
        NodeConfig(NetworkConfig(), **how)


def test_the_dtype_of_several_devices_is_one_that_all_have(monkeypatch):
    FakeCuda(monkeypatch, 2)
    found = {"cuda:0": "bfloat16", "cuda:1": "float16"}
    monkeypatch.setattr(main, "best_dtype", lambda device: found[device])
    assert main._devices_and_dtype(NodeConfig(NetworkConfig(), device="cuda:0,cuda:1"))[1] == "float16"
    assert main._devices_and_dtype(NodeConfig(NetworkConfig(), device="cuda:0"))[1] == "bfloat16"


def test_a_number_changes_nothing_about_the_kind_of_a_device():
    for name in ("cuda", "cuda:0", "cuda:3", torch.device("cuda:1"), torch.device("cuda")):
        assert devices.kind_of(name) == "cuda"
        assert devices.has_own_memory(name)
        assert batcher.policy_for(name) is batcher.GPU_POLICY
    for name in ("cpu", "mps", torch.device("cpu")):
        assert not devices.has_own_memory(name)
        assert batcher.policy_for(name) is batcher.CPU_POLICY
    assert (devices.index_of("cuda"), devices.index_of("cuda:0"), devices.index_of("cuda:12")) == (
        None,
        0,
        12,
    )


def test_batches_of_a_cpu_are_as_they_were_and_those_of_a_gpu_larger():
    assert batcher.BatchPolicy() == batcher.CPU_POLICY
    assert (batcher.CPU_POLICY.chunk_positions, batcher.CPU_POLICY.max_rows) == (256, 64)
    assert batcher.GPU_POLICY.chunk_positions >= 1024
    assert batcher.GPU_POLICY.max_rows == 256


def test_the_fastest_device_that_is_there_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    FakeCuda(monkeypatch, 0)
    assert devices.find_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.find_device("auto") == "mps"
    for count in (1, 2):
        FakeCuda(monkeypatch, count)
        assert devices.find_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("count", "there"), [(0, "cpu"), (1, "cpu, cuda"), (3, "cpu, cuda:2, cuda:1, cuda:0")]
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch, count, there):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    FakeCuda(monkeypatch, count)
    with pytest.raises(ValueError, match=f"device cuda:3 is not there; {there} would be"):
        devices.find_device("cuda:3")
    for index in range(count):
        assert devices.find_device(f"cuda:{index}") == f"cuda:{index}"
    if count:
        assert devices.find_device("cuda") == "cuda"


def test_a_node_on_the_second_gpu_asks_the_second_gpu(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    config = NodeConfig(NetworkConfig(), device="cuda:1")
    assert main._devices_and_dtype(config)[:2] == (("cuda:1",), "bfloat16")
    assert cuda.current == 1
    cuda.current = 0  # each call names it all the same
    assert memory.free_bytes("cuda:1") == 2000 + 300 - 100  # what torch holds and does not use is free
    assert memory.free_for_training("cuda:1") == int(memory.TRAINING_SHARE * 2200)
    assert rates.device_name("cuda:1") == "GPU 1"
    devices.synchronize("cuda:1")
    assert {index for _, index in cuda.asked} == {1} == set(cuda.synchronized)
    served_span.forget_unused("cuda:1")
    assert cuda.emptied == 1
    served_span.forget_unused("cpu")
    assert cuda.emptied == 1


@pytest.mark.parametrize(("hip", "platform"), [(None, "CUDA 13.0"), ("6.4.1", "ROCm 6.4.1")])
def test_the_log_names_the_card_and_what_torch_was_built_for(monkeypatch, hip, platform):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    assert devices.hardware("cuda:1") == f"GPU 1, {platform}"
    assert devices.hardware("cuda") == f"GPU 0, {platform}"
    assert devices.hardware("cpu") == devices.hardware("mps") == ""


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_bfloat16_that_is_emulated_is_not_chosen(monkeypatch, device):
    FakeCuda(monkeypatch, bfloat16=False)
    assert main._devices_and_dtype(NodeConfig(NetworkConfig(), device=device))[1] == "float16"
    asked = NodeConfig(NetworkConfig(), device=device, dtype="float32")
    assert main._devices_and_dtype(asked)[1] == "float32"


@pytest.mark.parametrize(
    ("asked", "kept", "device", "found"),
    [
        (None, "none", "cuda:1", ("int8", "")),
        (None, "none", "cpu", ("none", "")),
        ("none", "none", "cuda", ("none", "")),
        (None, "int8", "cpu", ("int8", "")),  # a prepared folder
        ("nf4", "none", "cuda", ("nf4", "")),
        ("llm_int8", "none", "cuda", ("int8", "llm_int8")),
        ("llm_int8", "int8", "cuda", ("int8", "llm_int8")),
    ],
)
def test_rows_of_bitsandbytes_are_int8_for_everybody_else(asked, kept, device, found):
    config = NodeConfig(NetworkConfig(), quantize=asked)
    info: Any = SimpleNamespace(quantize=kept)
    assert main._quantize(config, info, device) == found
    precision = memory.Precision("bfloat16", found[0], "", found[1])
    assert precision.packing == (found[1] or found[0])


def test_bitsandbytes_rows_are_refused_where_there_is_no_cuda():
    with pytest.raises(ConfigError, match="llm_int8 works on cuda, not on cpu"):
        main._activations("bfloat16", "llm_int8", "cpu", "auto", True)
    found = main._activations("bfloat16", "llm_int8", "cuda:1", "auto", True)
    assert found == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3_text", "llama"])
def test_models_that_exceed_float16_are_named_in_a_warning(architecture, caplog):
    info: Any = SimpleNamespace(name="m", architecture=architecture)
    main._warn_of_overflow(info, memory.Precision("bfloat16"))
    assert not caplog.text
    main._warn_of_overflow(info, memory.Precision("float16"))
    assert ("--dtype float32" in caplog.text) == (architecture in OVERFLOW_FLOAT16)
    assert ("--dtype float32" in caplog.text) == (architecture != "llama")


def test_models_that_exceed_float16_are_in_the_table():
    assert set(ARCHITECTURES) >= OVERFLOW_FLOAT16


@pytest.mark.parametrize(
    ("version", "before", "name"),
    [
        ("2.13.0+cu130", {}, "PYTORCH_ALLOC_CONF"),
        ("2.9.0", {}, "PYTORCH_ALLOC_CONF"),
        ("2.8.1", {}, "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
        ("2.13.0", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("2.13.0", {"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": ""}, "PYTORCH_ALLOC_CONF"),
    ],
)
def test_memory_of_a_gpu_can_grow_in_place_unless_the_operator_has_chosen(monkeypatch, version, before, name):
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    environment = dict(before)
    devices.set_up_allocator(environment)
    if name is None:
        assert environment == before
    else:
        assert environment == {**before, name: "expandable_segments:True"}


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.OutOfMemoryError(), True),
        (MemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 20 MiB"), True),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OSError("Cannot allocate memory"), False),
    ],
    ids=str,
)
def test_what_torch_says_where_it_finds_no_memory(error, is_one):
    assert devices.is_out_of_memory(error) is is_one
