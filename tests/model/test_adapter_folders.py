"""Folders of peft against the library's models: in and out without a loss, and each fault by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from client.adapters.adapter import Adapter
from client.adapters.ends import ends_with
from client.adapters.folder import load_adapter, new_adapter, save_adapter
from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from tensor_codec.adapters import AdapterDtype, blob_bytes
from tests.model_fixtures import BLOCKS, TINY, save_tiny, save_tiny_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "query_key_value",
    "qkv_proj",
    "Wqkv",
    "c_attn",
    "out_proj",
}


def opened(variant: str, path: Path) -> tuple[Any, ModelFolder]:
    local = save_tiny(variant, path)
    save_tiny_tokenizer(path)
    return local, resolve(str(path), cache_dir=path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EmbedAndHead]:
    local, folder = opened("llama", tmp_path_factory.mktemp("adapters") / "llama")
    return local, load_embed_and_head(folder)


def shaken(adapter: Adapter) -> Adapter:
    """The adapter with every value away from where it begins."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def same(one: Adapter, other: Adapter, tolerance: float = 0.0) -> None:
    mine, theirs = one.named_parameters(), other.named_parameters()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=tolerance, atol=0.0, check_device=False)


@pytest.mark.parametrize("variant", TINY)
def test_every_architecture_s_linears_go_into_a_folder_and_out_again(variant, tmp_path):
    local, folder = opened(variant, tmp_path / "model")
    ends = load_embed_and_head(folder)
    adapter = shaken(new_adapter({"r": 2, "target_modules": "all-linear"}, ends))
    save_adapter(adapter, tmp_path / "saved", dtype="fp32")
    again = load_adapter(tmp_path / "saved", ends, dtype="bf16")
    same(adapter, again)
    assert again.id == adapter.id
    named = dict(local.named_modules())
    for name, tensor in load_file(tmp_path / "saved" / WEIGHTS).items():
        path, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
        rows, columns = named[path].weight.shape
        if not isinstance(named[path], nn.Linear):
            rows, columns = columns, rows  # Conv1D
        assert tuple(tensor.shape) == ((2, columns) if end == "A.weight" else (rows, 2))
    found = {name for shapes in ends.modules.shapes for name in shapes}
    assert found & ATTENTION, found
    for sites, shapes, blob in zip(
        adapter.manifest.blocks, ends.modules.shapes, adapter.blobs(), strict=True
    ):
        assert {site.name for site in sites} == set(shapes)
        assert len(blob) == blob_bytes(sites, shapes, "bf16")


def test_a_blob_is_a_and_b_of_the_sites_by_name(llama):
    _, ends = llama
    kinds: list[tuple[AdapterDtype, torch.dtype]] = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    for dtype, kind in kinds:
        adapter = shaken(new_adapter({"r": 2, "target_modules": ["v_proj", "q_proj"]}, ends, dtype=dtype))
        values = adapter.named_parameters()
        for block, blob in enumerate(adapter.blobs()):
            at = f"base_model.model.model.layers.{block}.self_attn"
            names = [f"{at}.{site}.lora_{side}.weight" for site in ("q_proj", "v_proj") for side in "AB"]
            expected = torch.cat([values[name].flatten() for name in names]).to(kind)
            assert torch.equal(torch.frombuffer(bytearray(blob), dtype=kind), expected)


def test_a_new_adapter_has_the_first_values_of_peft(llama):
    _, ends = llama
    adapter = new_adapter({"r": 4, "target_modules": ["q_proj", "embed_tokens"]}, ends)
    for name, value in adapter.named_parameters().items():
        if name.endswith(("lora_B.weight", "lora_embedding_A")):
            assert not value.any()
        else:
            assert value.abs().max() > 0.05
    a = torch.cat([value for name, value in adapter.named_parameters().items() if "lora_A" in name])
    assert a.abs().max() <= 1 / 32**0.5  # uniform, as torch begins a linear of 32 inputs
    assert a.abs().max() > 0.9 / 32**0.5
    assert all(
        parameter.requires_grad and parameter.dtype == torch.float32 for parameter in adapter.parameters()
    )


def test_patterns_and_layers_are_settled_in_the_manifest(llama):
    _, ends = llama
    config = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 4],
        "rank_pattern": {"layers.4.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 1},
        "use_rslora": True,
    }  # fmt: skip
    blocks = new_adapter(config, ends).manifest.blocks
    assert [len(sites) for sites in blocks] == [0, 2, 0, 0, 2, 0]
    assert [(site.name, site.rank, site.scale) for site in blocks[1]] == [
        ("down_proj", 4, 0.5),
        ("q_proj", 4, 4.0),
    ]
    assert [(site.name, site.rank) for site in blocks[4]] == [("down_proj", 4), ("q_proj", 2)]
    assert blocks[4][1].scale == 8 / 2**0.5


def test_linears_of_one_name_are_two_sites(tmp_path):
    _, folder = opened("gpt2", tmp_path / "model")
    ends = load_embed_and_head(folder)
    config = {"r": 2, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    adapter = new_adapter(config, ends)
    (first, *_) = adapter.manifest.blocks
    assert [site.name for site in first] == ["c_attn", "mlp_c_proj"]


def test_a_family_s_usual_targets_are_peft_s(llama, tmp_path):
    _, ends = llama
    assert {site.name for site in new_adapter({}, ends).manifest.blocks[0]} == {"q_proj", "v_proj"}
    _, folder = opened("nemotron", tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"target_modules is not given, and nemotron has no usual ones: .*'all-linear'"
    ):
        new_adapter({}, load_embed_and_head(folder))


def test_experts_are_refused(tmp_path):
    _, folder = opened("mixtral", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"target_modules names model.layers.0.mlp.experts: an expert sees"):
        new_adapter({"target_modules": ["experts"]}, load_embed_and_head(folder))


def test_the_id_follows_the_values(llama):
    _, ends = llama
    adapter = new_adapter({"target_modules": ["q_proj"]}, ends)
    before, content = adapter.id, adapter.content()
    assert adapter.content() is content
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert adapter.id != before
    content = adapter.renew()
    assert adapter.renew() is content  # looked at, and nothing has changed
    adapter.parameters()[0].data.add_(1.0)  # past torch's count
    assert adapter.renew() is not content


def test_values_that_no_server_takes_are_refused_at_home(llama):
    _, ends = llama
    adapter = new_adapter({"target_modules": ["q_proj"]}, ends)
    for bad in (float("nan"), float("inf"), 1.1e4):
        with torch.no_grad():
            adapter.parameters()[0][0, 0] = bad
        with pytest.raises(ValueError, match="finite values up to 10000 are allowed"):
            adapter.content()


def test_gradients_of_blobs_come_back_in_the_parameters_shapes(llama):
    _, ends = llama
    adapter = new_adapter(
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3]}, ends
    )
    flat = torch.arange(2 * (32 + 32) + 2 * (32 + 16)).float()
    for times in (1, 2):
        adapter.add_gradients({3: flat})
        grads = {name: one.grad for name, one in adapter.named_parameters().items() if one.grad is not None}
        assert all(".layers.3." in name for name in grads)
        assert torch.equal(torch.cat([grad.flatten() for grad in grads.values()]), times * flat)
        assert [grad.shape for grad in grads.values()] == [(2, 32), (32, 2), (2, 32), (16, 2)]


# --- the modules of the client ---


def tokens() -> torch.Tensor:
    return torch.arange(3, 11).view(1, 8)


def test_low_rank_matrices_of_embedding_and_head_are_applied_here(llama, tmp_path):
    _, ends = llama
    adapter = shaken(
        new_adapter({"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head"]}, ends)
    )
    assert not adapter.is_in_blocks
    save_adapter(adapter, tmp_path, dtype="fp32")
    adapted = ends_with(ends, load_adapter(tmp_path, ends))
    values = {name.removeprefix("base_model.model."): one for name, one in adapter.named_parameters().items()}
    plain = ends.embed(tokens(), 0)
    a, b = values["model.embed_tokens.lora_embedding_A"], values["model.embed_tokens.lora_embedding_B"]
    embedded = plain + 2.0 * (a.T[tokens()] @ b.T)
    torch.testing.assert_close(adapted.embed(tokens(), 0), embedded.detach())
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    normed = ends.model.model.norm(hidden)
    added = 2.0 * (normed @ values["lm_head.lora_A.weight"].T) @ values["lm_head.lora_B.weight"].T
    torch.testing.assert_close(adapted.head(hidden), (ends.head(hidden) + added).detach())
    assert torch.equal(ends.embed(tokens(), 0), plain)  # the client's own model is as it was
    assert ends_with(ends, new_adapter({"target_modules": ["q_proj"]}, ends)) is ends


def test_modules_to_save_are_replaced_here(llama, tmp_path):
    _, ends = llama
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    adapter = new_adapter(config, ends)
    values = adapter.named_parameters()
    assert torch.equal(values["base_model.model.lm_head.weight"], ends.model.lm_head.weight)
    shaken(adapter)
    save_adapter(adapter, tmp_path, dtype="fp32")
    again = load_adapter(tmp_path, ends)
    same(adapter, again)
    adapted, values = ends_with(ends, again), again.named_parameters()
    expected = values["base_model.model.model.embed_tokens.weight"][tokens()]
    torch.testing.assert_close(adapted.embed(tokens(), 0), expected.detach())
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    logits = ends.model.model.norm(hidden) @ values["base_model.model.lm_head.weight"].T
    torch.testing.assert_close(adapted.head(hidden), logits.detach())


def test_a_folder_has_the_values_that_are_computed_with(llama, tmp_path):
    _, ends = llama
    config = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapter = shaken(new_adapter(config, ends, dtype="bf16"))
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path, ends)
    assert again.id == adapter.id  # in bfloat16, as servers get it
    mine, theirs = adapter.named_parameters(), again.named_parameters()
    for name in mine:
        if ".layers." not in name:
            assert torch.equal(mine[name], theirs[name])  # float32, as the client computes
    save_adapter(adapter, tmp_path, dtype="bf16")
    assert {each.dtype for each in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}


def test_a_head_of_another_task_is_refused_where_it_is_missing(llama, tmp_path):
    _, ends = llama
    save_adapter(new_adapter({"target_modules": ["q_proj"]}, ends), tmp_path)
    changed(tmp_path, {"modules_to_save": ["score"]}, {"base_model.model.score.weight": torch.ones(3, 32)})
    adapter = load_adapter(tmp_path, ends)
    with pytest.raises(ValueError, match="values for score, which LlamaForCausalLM does not have"):
        ends_with(ends, adapter)


# --- prompts ---


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompts_go_into_a_folder_and_out_again(llama, tmp_path, kind):
    _, ends = llama
    adapter = new_adapter({"peft_type": kind, "num_virtual_tokens": 5}, ends)
    save_adapter(adapter, tmp_path, dtype="fp32")
    again = load_adapter(tmp_path, ends)
    same(adapter, again)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["num_virtual_tokens"] == 5
    (saved,) = load_file(tmp_path / WEIGHTS).values()
    if kind == "PROMPT_TUNING":
        assert saved.shape == (5, 32)
        assert not adapter.is_in_blocks
        assert not any(adapter.blobs())
        return
    assert saved.shape == (5, BLOCKS * 2 * 16)
    assert again.manifest.kind == "prefix"
    assert again.manifest.virtual_tokens == 5
    key = saved.view(5, BLOCKS * 2, 2, 8)[:, 2 * 3]  # of block 3, as peft divides it
    blob = torch.frombuffer(bytearray(again.blobs()[3]), dtype=torch.float32).view(2, 5, 2, 8)
    assert torch.equal(blob[0], key)


# --- faults ---


def changed(folder: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Change a folder: None takes a field or a tensor away."""
    for path, changes in ((CONFIG, fields), (WEIGHTS, tensors)):
        file = folder / path
        old = json.loads(file.read_text()) if path == CONFIG else load_file(file)
        new = {name: value for name, value in {**old, **changes}.items() if value is not None}
        if path == CONFIG:
            file.write_text(json.dumps(new))
        else:
            save_file(new, file)


A, B = (f"base_model.model.model.layers.2.self_attn.q_proj.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora is True: the magnitudes of DoRA are not computed"),
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3', LORA, PROMPT_TUNING or PREFIX_TUNING is allowed"),
        ({"peft_type": None}, {}, "peft_type is None"),
        ({"r": 3}, {}, "lora_A of model.layers.0.self_attn.q_proj is [2, 32], [3, 32] is needed"),
        ({}, {A: None}, "has no lora_A and lora_B of model.layers.2.self_attn.q_proj"),
        (
            {},
            {B: torch.zeros(31, 2)},
            "lora_B of model.layers.2.self_attn.q_proj is [31, 2], [32, 2] is needed",
        ),
        ({}, {A: torch.full((2, 32), float("nan"))}, f"{A} holds NaN or infinity"),
        ({}, {A: torch.ones(2, 32, dtype=torch.int8)}, f"{A} holds torch.int8"),
        (
            {},
            {A.replace("q_proj", "z_proj"): torch.zeros(2, 32)},
            "has tensors of model.layers.2.self_attn.z_proj",
        ),
        (
            {},
            {A.replace("q_proj", "k_proj"): torch.zeros(2, 32)},
            "has tensors of model.layers.2.self_attn.k_proj",
        ),
        ({}, {A.removeprefix("base_"): torch.zeros(2, 32)}, "is no tensor of peft's LoRA"),
        ({}, {B.replace("weight", "bias"): torch.zeros(32)}, "lora_bias is not supported"),
        ({}, {A.replace("A.weight", "magnitude_vector"): torch.zeros(32)}, "use_dora is not supported"),
        (
            {"modules_to_save": ["input_layernorm"]},
            {},
            "modules_to_save names model.layers.0.input_layernorm",
        ),
        ({"modules_to_save": ["model"]}, {}, "modules_to_save names model: blocks stay as they are"),
        ({"modules_to_save": ["lm_head"]}, {}, "has no tensor of lm_head, which modules_to_save names"),
        (
            {"modules_to_save": ["lm_head"]},
            {"base_model.model.lm_head.weight": torch.zeros(97, 32)},
            "lm_head.weight is [97, 32], [96, 32] is needed",
        ),
        (
            {"target_modules": ["z_proj"]},
            {},
            "target_modules names no module of the model: down_proj, gate_proj",
        ),
        (
            {"target_modules": ["norm"]},
            {},
            "target_modules names model.norm: it is no linear and no embedding",
        ),
        ({"target_modules": ["mlp"]}, {}, "target_modules names model.layers.0.mlp: linears of blocks may"),
        (
            {"fan_in_fan_out": True},
            {},
            "fan_in_fan_out is true: model.layers.0.self_attn.q_proj is no Conv1D",
        ),
        ({"r": 33}, {}, "rank 33 at model.layers.0.self_attn.q_proj of 32 x 32"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(llama, tmp_path, fields, tensors, message):
    _, ends = llama
    save_adapter(new_adapter({"r": 2, "target_modules": ["q_proj"]}, ends), tmp_path)
    load_adapter(tmp_path, ends)
    changed(tmp_path, fields, tensors)
    with pytest.raises(ConfigError) as error:
        load_adapter(tmp_path, ends)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"num_virtual_tokens": 4}, {}, "prompt_embeddings is [5, 32], [4, 32] is needed"),
        ({"num_virtual_tokens": 0}, {}, "num_virtual_tokens is 0"),
        ({"num_transformer_submodules": 2}, {}, "num_transformer_submodules is 2"),
        (
            {},
            {"prompt_embeddings": None, "other": torch.zeros(1)},
            "holds other, prompt_embeddings is needed",
        ),
        ({"peft_type": "PREFIX_TUNING"}, {}, "prompt_embeddings is [5, 32], [5, 192] is needed"),
        ({"peft_type": "PREFIX_TUNING", "num_attention_heads": 4}, {}, "num_attention_heads is 4"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_line(llama, tmp_path, fields, tensors, message):
    _, ends = llama
    save_adapter(new_adapter({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}, ends), tmp_path)
    changed(tmp_path, fields if "token_dim" in fields else {"token_dim": None, **fields}, tensors)
    with pytest.raises(ConfigError) as error:
        load_adapter(tmp_path, ends)
    assert message in str(error.value)


def test_a_folder_with_pickles_is_refused_and_nothing_of_it_is_opened(llama, tmp_path):
    _, ends = llama
    save_adapter(new_adapter({"target_modules": ["q_proj"]}, ends), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"has no {WEIGHTS}"):
        load_adapter(tmp_path, ends)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nabort\n)R.")  # would end the process
    with pytest.raises(
        ConfigError, match=r"adapter_model.bin, a pickle, which can run code and is never opened"
    ):
        load_adapter(tmp_path, ends)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 100])
def test_a_damaged_file_is_refused_in_one_line(llama, tmp_path, content):
    _, ends = llama
    save_adapter(new_adapter({"target_modules": ["q_proj"]}, ends), tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError, match=WEIGHTS):
        load_adapter(tmp_path, ends)


def test_what_is_no_adapter_s_folder_is_refused(llama, tmp_path):
    _, ends = llama
    with pytest.raises(ConfigError, match="is no folder of an adapter"):
        load_adapter(tmp_path / "missing", ends)
    with pytest.raises(ConfigError, match=f"has no {CONFIG}"):
        load_adapter(tmp_path, ends)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object is expected"):
        load_adapter(tmp_path, ends)


def test_a_folder_of_the_class_without_a_head_is_read_too(llama, tmp_path):
    _, ends = llama
    adapter = shaken(new_adapter({"r": 2, "target_modules": ["q_proj"]}, ends))
    save_adapter(adapter, tmp_path, dtype="fp32")
    file = tmp_path / WEIGHTS
    save_file({name.replace(".model.model.", ".model."): one for name, one in load_file(file).items()}, file)
    same(adapter, load_adapter(tmp_path, ends))
