"""Our own modules of llama's family: which configs they take, and that they compute the library's bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from node.config import ConfigError
from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.prefix import KeyValues, SpanPrefix
from node.model.blocks import span as spans
from node.model.blocks.forward_backward import backward, forward
from node.model.blocks.span import load_span
from node.model.checkpoint.architecture import ARCHITECTURES
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.embed_and_head import _is_fast_llama, load_embed_and_head, open_tokenizer
from node.model.llama.config import config_of
from node.model.llama.modules import LlamaForCausalLM, LlamaModel
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny, save_tiny_tokenizer

PLAIN: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "layer_types": None, "sliding_window": None}),
    "qwen3": ("qwen3", {}),
}


def saved(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFolder:
    """A tiny model of a family with these settings."""
    family, settings = FAMILIES[name]
    whole, given = TINY[family]
    monkeypatch.setitem(TINY, family, (whole, {**given, **settings}))
    save_tiny(family, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


@pytest.mark.parametrize("name", FAMILIES)
def test_spans_and_ends_compute_the_library_s_bits(name, tmp_path, monkeypatch):
    folder = saved(name, tmp_path, monkeypatch)
    ours, ends = load_span(folder, 1, 5), load_embed_and_head(folder)
    assert type(ours.model) is LlamaModel
    assert type(ends.model) is LlamaForCausalLM
    with monkeypatch.context() as patch:
        patch.setattr(spans, "config_of", lambda config: None)
        theirs, their_ends = load_span(folder, 1, 5), load_embed_and_head(folder)
    assert type(theirs.model).__module__.startswith("transformers.")
    assert type(their_ends.model).__module__.startswith("transformers.")
    assert (ours.shapes, ours.max_length) == (theirs.shapes, theirs.max_length)
    generator = torch.Generator().manual_seed(1)
    hidden, grad = (torch.randn(2, 7, 32, generator=generator) for _ in range(2))
    for rows in (hidden, hidden[:, :1]):
        assert torch.equal(forward(ours, rows, 1, 5), forward(theirs, rows, 1, 5))
        assert torch.equal(
            backward(ours, rows, grad[:, : rows.shape[1]], 2, 5),
            backward(theirs, rows, grad[:, : rows.shape[1]], 2, 5),
        )
    caches = [each.new_cache(2, 64) for each in (ours, theirs)]
    assert torch.equal(ours.forward(hidden, caches[0], 0), theirs.forward(hidden, caches[1], 0))
    ids = torch.randint(0, VOCAB, (2, 5), generator=generator)
    assert torch.equal(ends.embed(ids, 0), their_ends.embed(ids, 0))
    assert torch.equal(ends.head(hidden), their_ends.head(hidden))
    library = ends.library_model
    assert type(library).__module__ == type(their_ends.model).__module__
    for path, tensor in library.state_dict().items():
        assert tensor.data_ptr() == ends.model.state_dict()[path].data_ptr(), f"{path} is kept once"


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_after_a_prefix_have_the_library_s_gradients(tokens, tmp_path, monkeypatch):
    folder = saved("llama", tmp_path, monkeypatch)
    ours = load_span(folder, 0, 2)
    monkeypatch.setattr(spans, "config_of", lambda config: None)
    theirs = load_span(folder, 0, 2)
    generator = torch.Generator().manual_seed(2)
    hidden, grad = (torch.randn(2, tokens, 32, generator=generator) for _ in range(2))
    pairs = {
        block: KeyValues(torch.randn(3, 16, generator=generator), torch.randn(3, 16, generator=generator))
        for block in range(2)
    }
    found = []
    for span in (ours, theirs):
        with_prefix = AdaptedSpan(span, SpanPrefix("prefix", pairs), trains=True)
        found.append((backward(with_prefix, hidden, grad, 0, 2), with_prefix.gradients))
    assert torch.equal(found[0][0], found[1][0])
    for block in range(2):
        for name, own in found[0][1][block].items():
            for one, other in zip(own, found[1][1][block][name], strict=True):
                assert torch.equal(one, other)


def test_usual_configs_are_taken():
    assert config_of(PLAIN) is not None
    found = config_of(PLAIN | {"rope_scaling": {**LLAMA3, "rope_theta": 10000.0}})
    assert found is not None
    assert found.rope_parameters["rope_type"] == "llama3"
    assert config_of(PLAIN | {"rope_scaling": None, "torch_dtype": "bfloat16", "eos_token_id": [2, 3]})


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "gemma"},
        {"model_type": "smollm3"},
        {"model_type": ["llama"]},
        {"model_type": "mistral"},  # without the key its window is 4,096
        {"model_type": "mistral", "sliding_window": 5},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"] * 3},
        {"model_type": "qwen3"},  # without the key its heads have 128
        {"sliding_window": 5},
        {"hidden_act": "gelu"},
        {"hidden_size": None},
        {"hidden_size": 33},
        {"hidden_size": True},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": "2"},
        {"head_dim": 7},
        {"rms_norm_eps": "1e-6"},
        {"attention_bias": 1},
        {"rope_theta": None},
        {"rope_theta": float("inf")},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_scaling": "llama3"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": 2.0}},
    ],
)
def test_every_other_config_is_the_library_s(other):
    assert config_of(PLAIN | other) is None


def test_a_config_without_one_of_its_sizes_is_the_library_s():
    for name in PLAIN:
        assert config_of({key: value for key, value in PLAIN.items() if key != name}) is None, name


def test_other_families_go_through_the_library():
    others = ARCHITECTURES.keys() - {"llama", "mistral", "qwen2", "qwen3"}
    assert all(config_of(PLAIN | {"model_type": name}) is None for name in others)


def test_what_does_not_fit_is_refused_in_the_library_s_words(tmp_path, monkeypatch):
    folder = saved("llama", tmp_path, monkeypatch)
    path = folder.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))
    changed = open_folder(folder.path, memo=HashMemo(tmp_path / "hashes.json"))
    with pytest.raises(ConfigError, match="has the shape 32x48, the config asks for 32x40"):
        load_span(changed, 0, BLOCKS)


@pytest.mark.parametrize(("model_type", "is_direct"), [("llama", True), ("gpt2", False)])
def test_the_tokenizer_of_a_llama_is_the_one_that_the_library_chooses(model_type, is_direct, tmp_path):
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    both = found, library = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert _is_fast_llama(tmp_path) is is_direct
    assert type(found) is type(library)
    assert (found("a b\n").data, found.get_vocab()) == (library("a b\n").data, library.get_vocab())
    texts = [each.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) for each in both]
    assert texts[0] == texts[1]
    assert (found.special_tokens_map, found.model_max_length) == (
        library.special_tokens_map, library.model_max_length,
    )  # fmt: skip
