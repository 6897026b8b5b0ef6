"""The head is the one that is in the file, whatever the config says of ties: as the library has it."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from node.config import ConfigError
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import load_embed_and_head
from tests.model_fixtures import TINY, tiny_model

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "wte.weight")
KINDS = ("other head", "same head", "no head", "no embedding")


def write(variant: str, kind: str, path, *, tied: bool = True):
    """A checkpoint that is tied or not by its config; the library's class."""
    model = tiny_model(variant)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(EMBEDDINGS))
    (head,) = (name for name in model._tied_weights_keys if name.endswith(".weight"))
    for name in ("lm_head.weight", "embed_out.weight"):
        tensors.pop(name, None)
    if kind != "no head":
        shift = 0.1 if kind == "other head" else 0.0
        tensors[head] = tensors[embedding].clone() + shift * torch.randn(tensors[embedding].shape)
    if kind == "no embedding":
        del tensors[embedding]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(config))
    return type(model)


@pytest.mark.parametrize("variant", sorted(set(TINY) - {"opt_projected"}))
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_used(variant, tmp_path):
    check(write(variant, "other head", tmp_path / "model"), tmp_path, differ=True)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_of_two_that_are_tied_is_enough(variant, kind, tmp_path):
    check(write(variant, kind, tmp_path / "model"), tmp_path, differ=False)


def check(library, tmp_path, *, differ: bool) -> None:
    ends = load_embed_and_head(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
    whole, model = library.from_pretrained(tmp_path / "model"), cast(Any, ends.model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding, whole.get_input_embeddings().weight)
    assert torch.equal(head, whole.get_output_embeddings().weight)
    assert torch.equal(embedding, head) is not differ
    assert (head.data_ptr() == embedding.data_ptr()) is not differ, "what is tied is there once"


def test_a_head_that_is_nowhere_is_missed(tmp_path):
    write("llama", "no head", tmp_path / "model", tied=False)
    with pytest.raises(ConfigError, match=r"tensor lm_head\.weight of the ends is missing"):
        load_embed_and_head(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
