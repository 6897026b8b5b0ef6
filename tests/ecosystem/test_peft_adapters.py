"""Adapters of this project and of peft: one folder, the same modules, ranks, scales, logits and steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import client
from client.hf import from_swarm
from node.model.peft.config import fields_of, lora_settings
from tests.model_fixtures import TINY, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages

IDS = torch.arange(3, 35).view(4, 8)
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "pattern": {"r": 4, "target_modules": r".*layers\.[024]\..*(q|down)_proj"},
    "layers": {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": [1, 5],
               "layers_pattern": "layers"},
    "ranks": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\.3\.mlp\.up_proj": 3}, "use_rslora": True,
    },
    "ends": {
        "r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "saved": {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}  # fmt: skip


def shaken(parameters: Any) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for each in parameters:
            each.add_(torch.randn_like(each) * 0.2)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_peft_loads_our_folder_and_computes_our_logits(
    nodes: Any, local: Any, tmp_path: Path, name: str
) -> None:
    from peft import LoraConfig, PeftModel

    adapter = client.new_adapter(LoraConfig(**CONFIGS[name]), nodes.swarm)
    shaken(adapter.parameters())
    client.save_adapter(adapter, tmp_path)
    model = from_swarm(nodes.swarm)
    model.load_adapter(adapter)
    expected = PeftModel.from_pretrained(local, tmp_path)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_we_load_peft_s_folder_and_compute_its_logits(
    nodes: Any, local: Any, tmp_path: Path, name: str
) -> None:
    from peft import LoraConfig, get_peft_model

    plain = from_swarm(nodes.swarm)(IDS).logits
    tuned = get_peft_model(local, LoraConfig(**CONFIGS[name]))
    shaken(each for each in tuned.parameters() if each.requires_grad)
    expected = tuned(IDS).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    tuned.save_pretrained(tmp_path)
    model = from_swarm(nodes.swarm)
    model.load_adapter(tmp_path)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_prompts_of_peft_are_read_and_written(nodes: Any, local: Any, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    chosen = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    tuned = get_peft_model(local, chosen(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tuned.save_pretrained(tmp_path / "theirs")
    adapter = client.load_adapter(tmp_path / "theirs", nodes.swarm)
    client.save_adapter(adapter, tmp_path / "ours")
    tuned.eval()
    again = PeftModel.from_pretrained(local, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, tuned(IDS).logits)
        if kind == "soft":
            model = from_swarm(nodes.swarm)
            model.load_adapter(adapter)
            expected = tuned(IDS).logits[:, -IDS.shape[1] :]
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_steps_of_training_are_peft_s(nodes: Any, local: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = from_swarm(nodes.swarm)
    model.add_adapter(LoraConfig(**CONFIGS["ranks"]), dtype="fp32")
    tuned = get_peft_model(local, LoraConfig(**CONFIGS["ranks"]))
    mine = model.get_adapter().named_parameters()
    theirs = {key.replace(".default", ""): one for key, one in tuned.named_parameters() if one.requires_grad}
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        for key, one in theirs.items():
            one.copy_(mine[key])
    optimizers = [torch.optim.AdamW(each.values(), lr=0.02) for each in (mine, theirs)]
    for _ in range(5):
        losses = [one(input_ids=IDS, labels=IDS).loss for one in (model, tuned)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, one in theirs.items():
        torch.testing.assert_close(mine[key], one, rtol=1e-3, atol=1e-5)


TARGETS: list[Any] = [
    ["q_proj"], ["proj"], ["self_attn.q_proj"], ["c_attn"], ["query_key_value"], "all-linear",
    r".*\.1\..*proj", ["o_proj", "lm_head"], [], ["down_proj", "fc1", "dense"],
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {},
    {"exclude_modules": ["k_proj", "layers.1.self_attn.q_proj"]},
    {"exclude_modules": r".*\.2\..*"},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [1, 3]},
    {"layers_to_transform": 2, "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [2], "layers_pattern": "nowhere"},
    {"rank_pattern": {"q_proj": 2, ".*": 1}, "alpha_pattern": {r"layers\.1\..*": 5}},
]


@pytest.mark.parametrize("variant", ["llama", "gpt2", "falcon", "mixtral", "deepseek_v3"])
def test_the_modules_a_config_names_are_peft_s(variant: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    model = save_tiny(variant, tmp_path)
    for targets, others in itertools.product(TARGETS, OTHERS):
        if isinstance(targets, str) and "layers_to_transform" in others:
            continue  # peft refuses the two together
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **others)
        settings = lora_settings(fields_of(config), "config")
        for path in (name for name, _ in model.named_modules() if name):
            if targets != "all-linear":
                assert settings.targets_module(path) == bool(check_target_module_exists(config, path)), path
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
            assert settings.rank_of(path) == rank
            assert settings.scale_of(path, rank) == alpha / rank


@pytest.mark.parametrize("variant", TINY)
def test_all_linears_are_those_of_peft_but_for_experts_and_their_choosers(
    variant: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    from node.model.checkpoint.source import resolve
    from node.model.embed_and_head import load_embed_and_head

    model = save_tiny(variant, tmp_path)
    ends = load_embed_and_head(resolve(str(tmp_path), cache_dir=tmp_path))
    adapter = client.new_adapter({"r": 2, "target_modules": "all-linear"}, ends)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    theirs = {
        name.replace(".default", ""): one.shape for name, one in tuned.named_parameters() if one.requires_grad
    }
    mine = {name: one.shape for name, one in adapter.named_parameters().items()}
    left_out = (".router.", ".gate.", ".experts.")
    assert not {name for name in theirs.keys() - mine.keys() if not any(part in name for part in left_out)}
    if any(".experts." in name for name in theirs):  # peft leaves out dense layers in between
        mine = {name: shape for name, shape in mine.items() if ".mlp." not in name}
    assert mine.items() <= theirs.items()
