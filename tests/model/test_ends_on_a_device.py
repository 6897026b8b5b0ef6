"""Embedding, norm and head of a client on a device and in a dtype of choice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from client.adapters.ends import AdaptedModule
from client.arguments import add_swarm
from client.config import client_config
from client.hf.auto import _ends_of, dtype_of
from client.swarm import _load_model
from node.config import ConfigError
from node.model import embed_and_head
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.model.peft.tensors import EndTensors
from node.runtime.arguments import Parser

PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"


def loaded(model: Path, **how: Any) -> EmbedAndHead:
    return _load_model(client_config(model, peers=PEER, **how))[1]


@pytest.mark.parametrize("how", [{}, {"dtype": "auto"}, {"dtype": "float32"}, {"device": "cpu"}])
def test_ends_are_the_cpu_s_in_float32_with_its_own_kernel_unless_told_otherwise(tiny_llama, how):
    ends = loaded(tiny_llama, **how)
    assert (ends.device.type, ends.dtype) == ("cpu", torch.float32)
    assert ends.stateless
    assert ends.product is not None


def test_ends_in_bfloat16_answer_logits_in_float32_about_as_float32_does(tiny_llama):
    whole, half = loaded(tiny_llama), loaded(tiny_llama, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.product is None
    half.make_exact_argmax()
    ids = torch.tensor([[3, 5, 7]])
    embedded = half.embed(ids, 0)
    torch.testing.assert_close(embedded.float(), whole.embed(ids, 0), rtol=1e-2, atol=1e-3)
    hidden = torch.randn(2, 1, whole.hidden_size)
    for best_only in (False, True):
        logits = half.head(hidden, best_only=best_only)
        assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(logits, whole.head(hidden), rtol=5e-2, atol=5e-2)


def test_the_device_and_the_hardware_s_dtype_reach_the_loading(tiny_llama, monkeypatch):
    asked: list[tuple[str, torch.dtype]] = []
    current: list[int] = []
    real = load_embed_and_head

    def load(folder: Any, *, dtype: torch.dtype, device: str, progress: Any) -> EmbedAndHead:
        asked.append((device, dtype))
        return real(folder, dtype=dtype, progress=progress)

    for name, fake in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": current.append,
        "is_bf16_supported": lambda including_emulation=True: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(embed_and_head, "load_embed_and_head", load)
    loaded(tiny_llama, device="cuda:1")
    assert current[0] == 1
    loaded(tiny_llama, device="auto", dtype="float16")
    assert asked == [("cuda:1", torch.bfloat16), ("cuda", torch.float16)]
    with pytest.raises(ConfigError, match=r"device cuda:2 is not there; cpu, cuda:1, cuda:0 would be"):
        loaded(tiny_llama, device="cuda:2")


def test_ends_on_another_device_answer_from_the_torch_thread_alone(tiny_llama, tmp_path):
    ends = load_embed_and_head(
        open_folder(tiny_llama, memo=HashMemo(tmp_path / "hashes.json")), device="meta"
    )
    assert not ends.stateless
    assert ends.embed(torch.tensor([[3, 5]]), 0).device.type == "meta"  # ids went there
    ends.compile_head()
    ends.make_exact_argmax()
    assert ends.product is None


def test_the_flags_of_a_client_name_them():
    parser = Parser(prog="x")
    add_swarm(parser)
    flags = parser.parse_args(["--peers", PEER, "--device", "cuda:1", "--dtype", "float16"])
    assert (flags.device, flags.dtype) == ("cuda:1", "float16")
    flags = parser.parse_args(["--peers", PEER])
    assert (flags.device, flags.dtype) == ("cpu", "auto")
    with pytest.raises(SystemExit):
        parser.parse_args(["--peers", PEER, "--device", "xpu"])


def test_a_model_of_transformers_joins_with_its_own_device_and_follows_the_swarm_s_else():
    assert _ends_of("cuda:1", torch.bfloat16) == {"device": "cuda:1", "dtype": "bfloat16"}
    assert _ends_of(torch.device("cuda"), "float16") == {"device": "cuda", "dtype": "float16"}
    assert _ends_of("cpu", torch.bfloat16) == {}  # joined as ever, and converted
    assert _ends_of("cuda", torch.float64) == {}
    ends: Any = SimpleNamespace(dtype=torch.bfloat16)
    assert dtype_of(ends.dtype, ends) == torch.bfloat16


def test_an_adapter_s_values_go_where_the_module_is():
    base = nn.Linear(4, 4, bias=False)
    end = EndTensors(site=None, a=None, b=None, values={"weight": nn.Parameter(torch.ones(4, 4))})
    module = AdaptedModule(base.to(torch.bfloat16), end)
    assert module(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
