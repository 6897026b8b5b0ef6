"""Prefix tuning of peft: its folders here and ours there, with the same logits and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.blobs import read_block, span_adapter
from node.model.adapters.prefix import SpanPrefix, guest_shapes
from node.model.blocks.forward_backward import backward, forward
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.model.peft.folder import read_adapter, write_adapter
from node.model.peft.modules import ModelModules, model_modules
from node.model.peft.tensors import AdapterTensors
from tests.model_fixtures import BLOCKS, VOCAB, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the package

TOLERANCE = 1e-5  # relative to the largest value
COUNT = 6
# peft takes the heads of keys and values from the config; it has no place for falcon's.
VARIANTS = ("llama", "qwen3", "gemma", "bloom", "gpt2", "gpt_neox", "opt", "mixtral", "phi", "stablelm")


class Case:
    def __init__(self, variant: str, path: Path) -> None:
        self.whole: Any = save_tiny(variant, path / "model")
        folder = open_folder(path / "model", memo=HashMemo(path / "hashes.json"))
        self.span: Span = load_span(folder, 0, BLOCKS)
        self.ends: EmbedAndHead = load_embed_and_head(folder)
        self.modules: ModelModules = model_modules(folder)
        self.ids: Tensor = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))

    def held(self, tensors: AdapterTensors) -> SpanPrefix:
        content, shapes = tensors.content(), guest_shapes(self.span)
        read = {
            block: read_block(
                content.manifest.parts(block), shapes[block], tensors.dtype, content.blobs[block]
            )
            for block in range(BLOCKS)
        }
        found = span_adapter(content.id, read)
        assert isinstance(found, SpanPrefix)
        return found

    def logits(self, tensors: AdapterTensors) -> Tensor:
        cache = self.span.new_arena(600).open(len(self.ids), 64)
        cache.begin_with(self.held(tensors))
        return self.ends.head(self.span.forward(self.ends.embed(self.ids, COUNT), cache, 0))


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def peft_model(whole: Any, projection: bool) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(3)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prefix_projection=projection, encoder_hidden_size=12
    )
    return get_peft_model(whole, config).eval()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_peft_gives_its_logits_and_ours_gives_peft_the_same(
    variant: str, projection: bool, tmp_path: Path
) -> None:
    from peft import PeftModel

    case = Case(variant, tmp_path)
    theirs = peft_model(case.whole, projection)
    with torch.no_grad():
        expected = theirs(case.ids).logits
        plain = case.whole(case.ids, use_cache=False).logits
    assert error(plain, expected) > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = read_adapter(tmp_path / "theirs", case.modules)
    assert error(case.logits(tensors), expected) <= TOLERANCE

    write_adapter(tensors, tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["prefix_projection"] is False
    again = PeftModel.from_pretrained(save_tiny(variant, tmp_path / "again"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert error(again(case.ids).logits, expected) <= TOLERANCE


def test_a_step_of_training_is_peft_s(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    theirs = peft_model(case.whole, False)
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = read_adapter(tmp_path / "theirs", case.modules)
    (parameter,) = [each for each in theirs.parameters() if each.requires_grad]
    theirs(case.ids, labels=case.ids).loss.backward()

    own = case.held(tensors)
    hidden = case.ends.embed(case.ids, COUNT)
    output = forward(AdaptedSpan(case.span, own), hidden, 0, BLOCKS).clone().requires_grad_()
    norm, head = case.whole.model.norm, case.whole.lm_head
    loss = torch.nn.functional.cross_entropy(
        head(norm(output))[:, :-1].flatten(0, 1), case.ids[:, 1:].flatten()
    )
    (grad,) = torch.autograd.grad(loss, output)
    trained = AdaptedSpan(case.span, own, trains=True)
    backward(trained, hidden, grad, 0, BLOCKS)
    pairs = [torch.stack(trained.gradients[block]["keys and values"]) for block in range(BLOCKS)]
    found = torch.stack(pairs).permute(2, 0, 1, 3).reshape(COUNT, -1)  # [n, blocks, 2, kv_values]
    assert parameter.grad is not None
    assert error(found, parameter.grad) <= TOLERANCE
