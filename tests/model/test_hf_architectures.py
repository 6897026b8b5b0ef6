"""Every architecture behaves as the library's whole model, when its blocks are in a swarm."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from client.hf import AutoDistributedModel, from_swarm
from tests.hf_swarm import nodes_of
from tests.model_fixtures import TINY, save_tiny, save_tiny_tokenizer
from tests.plain_lora import PlainLora

GREEDY = {"do_sample": False, "pad_token_id": 0}
ATTENTION = ("att", "Wqkv", "conv")  # in the paths of attention, and of what stands in its place


@dataclass
class Pair:
    """The library's model, and the same one in a swarm of two servers.

    base: the model without a head, over the swarm.  ids: padded on the left by `mask`.
    """

    variant: str
    local: Any
    remote: Any
    base: Any
    ids: Tensor
    mask: Tensor


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("hf") / request.param
    local = save_tiny(request.param, path)
    save_tiny_tokenizer(path)
    blocks = local.config.num_hidden_layers
    torch.manual_seed(1)
    ids = torch.randint(3, local.config.vocab_size, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    ids[mask == 0] = 0
    with nodes_of(path, [(0, blocks // 2), (blocks // 2, blocks)]) as nodes:
        base = from_swarm(nodes.swarm, task=AutoDistributedModel)
        yield Pair(request.param, local, from_swarm(nodes.swarm), base, ids, mask)


def test_a_batch_that_is_padded_on_the_left_gets_the_library_s_tokens(pair: Pair) -> None:
    mine, theirs = (
        model.generate(pair.ids, attention_mask=pair.mask, max_new_tokens=8, **GREEDY)
        for model in (pair.remote, pair.local)
    )
    assert torch.equal(mine, theirs)


def test_one_row_gets_the_library_s_tokens_by_both_loops(pair: Pair) -> None:
    ids = pair.ids[2:]
    theirs = pair.local.generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=8, **GREEDY), theirs)
    scored = pair.remote.generate(
        ids, max_new_tokens=8, output_scores=True, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(scored.sequences, theirs)


def test_beams_are_the_library_s(pair: Pair) -> None:
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    mine, theirs = (
        model.generate(pair.ids, attention_mask=pair.mask, **options) for model in (pair.remote, pair.local)
    )
    assert torch.equal(mine, theirs)


def test_a_loss_and_its_gradient_at_the_embeddings_are_the_library_s(pair: Pair) -> None:
    mask = pair.mask
    if pair.variant == "llama4_text":  # the library counts padding in chunks and temperatures of attention
        mask = torch.ones_like(mask)
    labels = pair.ids.masked_fill(mask == 0, -100)
    for row, first in enumerate(mask.argmax(-1)):
        labels[row, first] = -100  # foretold from padding
    found = []
    for model in (pair.local, pair.remote):
        embeds = pair.local.get_input_embeddings()(pair.ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), embeds.grad[mask.bool()]))
    (loss, grad), (my_loss, my_grad) = found
    torch.testing.assert_close(my_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(my_grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@torch.no_grad()
def test_logits_and_hidden_states_are_the_library_s(pair: Pair) -> None:
    mine, theirs = (model(pair.ids, output_hidden_states=True) for model in (pair.remote, pair.local))
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    for my_state, state in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(my_state, state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_model_without_a_head_is_the_library_s(pair: Pair) -> None:
    local = pair.local.get_submodule(pair.base.swarm.swarm.local_model.architecture.prefix)
    mine, theirs = (model(pair.ids).last_hidden_state for model in (pair.base, local))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    pair.base.close()  # the swarm is not its own, and goes on
    assert pair.base(pair.ids).last_hidden_state.shape == mine.shape


def test_a_step_of_lora_at_attention_is_that_of_one_process(pair: Pair) -> None:
    model = from_swarm(pair.remote.swarm.handle)
    modules = model.swarm.swarm.local_model.modules.modules.values()
    attention = [each.path for each in modules if each.site and any(kind in each.path for kind in ATTENTION)]
    model.add_adapter({"r": 2, "lora_alpha": 6, "target_modules": attention}, dtype="fp32")
    adapter = model.get_adapter()
    assert all(adapter.manifest.blocks)
    torch.manual_seed(2)
    with torch.no_grad():
        for each in adapter.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    plain = PlainLora(copy.deepcopy(pair.local), adapter)
    named = adapter.named_parameters()
    mine, theirs = list(named.values()), [plain.values[name] for name in named]
    ids = torch.where(pair.mask == 0, 3, pair.ids)
    losses = [one(ids, labels=ids).loss for one in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss, values in zip(losses, (mine, theirs), strict=True):
        loss.backward()
        torch.optim.SGD(values, lr=0.5).step()
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5 * float(other.grad.abs().max()))
    assert any(each.grad.any() for each in mine)
    with torch.no_grad():
        logits = [one(ids).logits for one in (model, plain)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[0], pair.remote(ids).logits, rtol=1e-3, atol=1e-3)
        tokens = [one.generate(ids[2:], max_new_tokens=6, **GREEDY) for one in (model, plain.model)]
        assert torch.equal(*tokens)
