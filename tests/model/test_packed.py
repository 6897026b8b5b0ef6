"""Checkpoints that others have quantised: read as the floats that they stand for, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.checkpoint.info import read_info
from node.model.checkpoint.prepare import prepare
from node.model.embed_and_head import load_embed_and_head
from tests.model_fixtures import _LLAMA, BLOCKS, TINY, VOCAB, tiny_model

torch.set_num_threads(1)

GPT_OSS = TINY["gpt_oss"][1] | {"intermediate_size": 64}


def write(path: Path, model: Any, tensors: dict[str, Tensor], settings: object) -> ModelFolder:
    """A folder with these tensors and settings."""
    model.config.save_pretrained(path)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return open_folder(path, memo=HashMemo(path.parent / "hashes.json"))


def opened(path: Path, settings: object, change: Any = None) -> ModelFolder:
    """A llama in floats whose config says that it is quantised."""
    model = tiny_model("llama")
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    if change is not None:
        change(tensors)
    return write(path, model, tensors, settings)


def logits_of(folder: ModelFolder, ids: Tensor, **how: Any) -> Tensor:
    ends, hidden = load_embed_and_head(folder), None
    hidden = ends.embed(ids, 0)
    for start, stop in ((0, 2), (2, BLOCKS)):
        span = load_span(folder, start, stop, **how)
        hidden = span.forward(hidden, span.new_cache(len(ids), 64), 0)
    return ends.head(hidden)


def check(folder: ModelFolder, whole: Any) -> None:
    """The same logits as the library's model with the same floats."""
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(ids).logits
    assert (logits_of(folder, ids) - expected).abs().max() <= 5e-6 * expected.abs().max()


def to_fp8(tensors: dict[str, Tensor], model: Any, rows: int, columns: int, exponents: bool) -> None:
    """Pack every matrix of the blocks, and let the model hold what that gives."""
    plain = model.state_dict()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        random = torch.Generator().manual_seed(len(name))
        scales = 2.0 ** torch.randint(-9, -6, (down, across), generator=random)
        if not exponents:
            scales = scales * 1.37
        wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        plain[name].copy_(tensors[name].float() * wide)
        tensors[name + "_scale_inv"] = (scales.log2() + 127).to(torch.uint8) if exponents else scales
        tensors[name.replace(".weight", ".activation_scale")] = torch.ones(1)


@pytest.mark.parametrize(
    ("rows", "columns", "exponents"), [(16, 16, False), (20, 20, False), (128, 128, False), (1, 32, True)]
)
def test_fp8_is_read_as_the_floats_that_it_stands_for(rows, columns, exponents, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    with torch.no_grad():
        to_fp8(tensors, model, rows, columns, exponents)
    settings = {"quant_method": "fp8", "weight_block_size": [rows, columns], "activation_scheme": "dynamic"}
    folder = write(tmp_path / "model", model, tensors, settings)
    check(folder, model)
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    expected = read_info(open_folder(plain, memo=HashMemo(tmp_path / "hashes.json")))
    assert read_info(folder).block_values == expected.block_values


def published(model: Any) -> dict[str, Tensor]:
    """The tensors of a gpt_oss as it is published, and its floats put into the model."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, plain = {}, model.state_dict()
    random = torch.Generator().manual_seed(1)
    for name, tensor in plain.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.clone()
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(118, 123, shape, dtype=torch.uint8, generator=random)
        tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
        tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    return tensors


@pytest.fixture
def gpt_oss(monkeypatch):
    monkeypatch.setitem(TINY, "gpt_oss", ("GptOssForCausalLM", GPT_OSS))
    return tiny_model("gpt_oss")


def test_gpt_oss_works_as_it_is_published(gpt_oss, tmp_path):
    with torch.no_grad():
        tensors = published(gpt_oss)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    folder = write(tmp_path / "model", gpt_oss, tensors, settings)
    check(folder, gpt_oss)
    gpt_oss.save_pretrained(tmp_path / "plain")
    plain = open_folder(tmp_path / "plain", memo=HashMemo(tmp_path / "hashes.json"))
    assert read_info(folder).block_values == read_info(plain).block_values
    ids = torch.arange(3, 12)[None]
    packed, floats = (logits_of(one, ids, quantize="int8") for one in (folder, plain))
    assert torch.equal(packed, floats), "--quantize packs the floats anew"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"load_in_8bit": True}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors'"),
        ({"quant_method": "torchao"}, "'torchao'"),
        ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8'"),
        ({"quant_method": "new"}, "'new'"),
        ({"bits": 4}, "'an unnamed method'"),
        ({}, "'an unnamed method'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_before_its_weights_are(settings, named, tmp_path):
    folder = opened(tmp_path / "model", settings)
    (tmp_path / "model/model.safetensors").unlink()
    for what in (read_info, load_embed_and_head, lambda folder: load_span(folder, 0, 1)):
        with pytest.raises(ConfigError, match="fp8 and mxfp4 can") as refused:
            what(folder)
        assert f"was quantised by {named}, which cannot be read" in str(refused.value)
        assert "\n" not in str(refused.value)


def drop_scales(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def add_scales(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.bias_scale_inv"] = torch.ones(1)


def wrong_scales(tensors: dict[str, Tensor]) -> None:
    drop_scales(tensors)
    tensors["model.layers.3.mlp.up_proj.weight_scale_inv"] = torch.ones(7, 2)


def wrong_blocks(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj_blocks"] = torch.ones(7, 2)
    tensors["model.layers.3.mlp.up_proj_scales"] = torch.ones(7, 2)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("fp8", drop_scales, r"up_proj\.weight \(F8_E4M3\) is without its .*weight_scale_inv"),
        ("fp8", add_scales, r"bias_scale_inv \(F32\) is without its .*bias$"),
        ("fp8", wrong_scales, r"up_proj\.weight of \(48, 32\) has scales of \(7, 2\)"),
        ("mxfp4", wrong_blocks, r"up_proj_blocks of \(7, 2\) .* is not mxfp4"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(method, change, message, tmp_path):
    folder = opened(tmp_path / "model", {"quant_method": method}, change)
    with pytest.raises(ConfigError, match=message):
        load_span(folder, 3, 4)


def test_settings_of_no_kind_are_refused_and_none_are_none(tmp_path):
    with pytest.raises(ConfigError, match="quantization_config is 'fp8', an object is expected"):
        read_info(opened(tmp_path / "model", "fp8"))
    assert read_info(opened(tmp_path / "other", None)).blocks == _LLAMA["num_hidden_layers"]


def test_what_is_quantised_already_is_not_prepared(tmp_path):
    folder = opened(tmp_path / "model", {"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="is quantised already, in fp8; a model in floats is needed"):
        prepare(folder, tmp_path / "out", memo=HashMemo(tmp_path / "hashes.json"))
