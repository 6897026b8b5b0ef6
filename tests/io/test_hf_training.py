"""Training over a swarm: gradients, prompts, heads and their files are those of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.hf as hf
from client.hf import from_swarm
from client.hf.training import load_trained, read_about
from tests.hf_swarm import Nodes, nodes_of
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    with nodes_of(folder, [(0, 3), (3, 6)]) as nodes:
        yield nodes


class Local(nn.Module):
    """The library's model of one process with the same prompts: soft ones in front, deep ones at blocks."""

    def __init__(self, folder: Path, prompts: Any) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
        self.soft = nn.Parameter(prompts.soft.detach().clone())
        self.deep = None if prompts.deep is None else nn.Parameter(prompts.deep.detach().clone())
        if self.deep is not None:
            for number, layer in enumerate(self.model.model.layers):
                layer.register_forward_pre_hook(self._adding(number), with_kwargs=True)

    def _adding(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, arguments: Any) -> Any:
            length = len(self.soft)
            hidden = args[0]
            head = hidden[:, :length] + self.deep[number]
            return (torch.cat([head, hidden[:, length:]], dim=1), *args[1:]), arguments

        return hook

    def loss(self, ids: Tensor) -> Tensor:
        embeds = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([self.soft.expand(len(ids), -1, -1), embeds], dim=1)
        logits = self.model(inputs_embeds=embeds).logits[:, len(self.soft) :]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompts_learn_as_in_one_process(nodes: Nodes, folder: Path, mode: str) -> None:
    torch.manual_seed(0)
    model = from_swarm(nodes.swarm, tuning_mode=mode, pre_seq_len=3)
    local = Local(folder, model.base_model.prompts)
    mine = [each for each in model.parameters() if each.requires_grad]
    theirs = [each for each in local.parameters() if each.requires_grad]
    assert [each.shape for each in mine] == [each.shape for each in theirs]
    optimizers = torch.optim.AdamW(mine, lr=0.05), torch.optim.AdamW(theirs, lr=0.05)
    losses = []
    for _ in range(4):
        loss, expected = model(IDS, labels=IDS).loss, local.loss(IDS)
        losses.append(float(loss.detach()))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for optimizer, one in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            one.backward()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("padded", [False, True])
def test_trained_prompts_generate_with_and_without_caches_alike(
    nodes: Nodes, mode: str, padded: bool
) -> None:
    torch.manual_seed(1)
    model = from_swarm(nodes.swarm, tuning_mode=mode, pre_seq_len=3)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_(0, 0.5)
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = IDS * mask
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    alone = model.generate(
        IDS[:1, 4:] if padded else IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found[0, -6:], alone[0, -6:])
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_what_was_trained_is_saved_with_its_revision_and_loaded_again(nodes: Nodes, tmp_path: Path) -> None:
    model = from_swarm(nodes.swarm, tuning_mode="deep_ptune", pre_seq_len=2)
    with torch.no_grad():
        model.base_model.prompts.deep.normal_()
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert (tmp_path / "model.safetensors").stat().st_size < 4096
    about = read_about(tmp_path)
    assert about is not None
    assert (about["tuning_mode"], about["pre_seq_len"]) == ("deep_ptune", 2)
    revision = nodes.swarm.info.revision
    twin = from_swarm(nodes.swarm, tuning_mode="deep_ptune", pre_seq_len=2)
    load_trained(twin, tmp_path, about, revision)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="the swarm serves 0123"):
        load_trained(twin, tmp_path, about, "0123")
    with pytest.raises(ValueError, match="missing nothing, unknown"):
        load_trained(from_swarm(nodes.swarm), tmp_path, about, revision)
    other = from_swarm(nodes.swarm, tuning_mode="deep_ptune", pre_seq_len=4)
    with pytest.raises(ValueError, match="is needed"):
        load_trained(other, tmp_path, about, revision)
    assert read_about(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="nothing to save"):
        from_swarm(nodes.swarm).save_pretrained(tmp_path / "frozen")


@pytest.mark.parametrize(
    ("task", "library"),
    [
        (hf.AutoDistributedModelForSequenceClassification, "AutoModelForSequenceClassification"),
        (hf.AutoDistributedModelForTokenClassification, "AutoModelForTokenClassification"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_head_for_a_task_is_trained_on_the_swarm_s_blocks(
    nodes: Nodes, folder: Path, tmp_path: Path, task: Any, library: str
) -> None:
    import transformers

    model = from_swarm(nodes.swarm, task=task, num_labels=3, pad_token_id=0)
    local = getattr(transformers, library).from_pretrained(folder, num_labels=3, pad_token_id=0).eval()
    with torch.no_grad():
        for one, other in zip(local.score.parameters(), model.score.parameters(), strict=True):
            one.copy_(other)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    labels = torch.tensor([2, 0]) if "Sequence" in library else torch.randint(0, 3, IDS.shape)
    labels = labels if "Sequence" in library else labels.masked_fill(mask == 0, -100)
    mine, theirs = (each(IDS * mask, attention_mask=mask, labels=labels) for each in (model, local))
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    for each in (mine.loss, theirs.loss):
        each.backward()
    torch.testing.assert_close(model.score.weight.grad, local.score.weight.grad, rtol=1e-3, atol=1e-6)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        f"score.{name}" for name, _ in model.score.named_parameters()
    }
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["raceme"]["revision"] == nodes.swarm.info.revision
    )
    with task.from_pretrained(tmp_path, peers=nodes.addresses, pad_token_id=0) as again:
        assert torch.equal(again.score.weight, model.score.weight)
        assert again.config.num_labels == 3


def test_a_task_that_the_library_has_not_is_refused(nodes: Nodes) -> None:
    class Other(hf.AutoDistributedModel):
        auto = "AutoModelForMaskedLM"

    with pytest.raises(ValueError, match="has none for llama"):
        from_swarm(nodes.swarm, task=Other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tuning_mode": "lora"}, "ptune, deep_ptune or None"),
        ({"tuning_mode": "ptune"}, "1 or more"),
        ({"pre_seq_len": 4}, "it needs tuning_mode"),
        ({"tunning_mode": "ptune"}, "tunning_mode is no argument, and no entry of the config of llama"),
        ({"device_map": "auto"}, "device= places embedding and head"),
        ({"load_in_8bit": True}, "each server chooses its own kind of weights"),
        ({"attn_implementation": "eager"}, "attention is at the servers"),
        ({"trust_remote_code": True}, "no code of a model's folder is run"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2: the blocks of the swarm have 6"),
        ({"dtype": "float8"}, "dtype is 'float8': float32, bfloat16"),
        ({"dtype": torch.int8}, "int8.*: float32, bfloat16"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(nodes: Nodes, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_swarm(nodes.swarm, **arguments)


def test_arguments_of_the_library_that_change_nothing_here_are_taken(nodes: Nodes) -> None:
    model = from_swarm(
        nodes.swarm, low_cpu_mem_usage=True, trust_remote_code=False, num_hidden_layers=6, pad_token_id=5
    )
    assert model.config.pad_token_id == 5


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_dtype_has_the_library_s_names(nodes: Nodes, name: str, dtype: torch.dtype) -> None:
    assert from_swarm(nodes.swarm, dtype=name).get_input_embeddings().weight.dtype == dtype


def test_overrides_of_the_config_are_saved_with_what_was_trained(
    nodes: Nodes, folder: Path, tmp_path: Path
) -> None:
    task = hf.AutoDistributedModelForSequenceClassification
    model = from_swarm(nodes.swarm, task=task, num_labels=3, pad_token_id=7)
    model.save_pretrained(tmp_path)
    joined = task.from_pretrained(tmp_path, peers=[nodes.addresses[0]])
    with joined:
        assert (joined.config.pad_token_id, joined.config.num_labels) == (7, 3)
        torch.testing.assert_close(joined.score.weight, model.score.weight)
    with task.from_pretrained(tmp_path, peers=[nodes.addresses[0]], pad_token_id=8) as other:
        assert other.config.pad_token_id == 8


def test_a_graph_serves_two_backwards(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    loss = model.blocks(hidden).square().sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


def test_micro_batches_of_several_threads_give_the_gradients_of_each_alone(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    inputs = [torch.randn(2, 7, 32, requires_grad=True) for _ in range(4)]

    def backward(hidden: Tensor) -> None:
        model.blocks(hidden).square().sum().backward()

    threads = [threading.Thread(target=backward, args=(each,)) for each in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in inputs:
        twin = each.detach().clone().requires_grad_()
        backward(twin)
        assert torch.equal(each.grad, twin.grad)


def test_ends_in_bfloat16_train_and_generate(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm, tuning_mode="ptune", pre_seq_len=2, dtype=torch.bfloat16)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    prompts = model.base_model.prompts.soft
    assert prompts.dtype == prompts.grad.dtype == torch.float32
    assert bool(prompts.grad.abs().sum() > 0)
    plain = from_swarm(nodes.swarm, dtype=torch.bfloat16)
    assert plain.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 12)
    assert nodes.swarm.local_model.dtype == torch.float32  # the client's own weights are untouched


def test_a_trained_head_is_used_by_generate(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    before = model.generate(IDS[:1], **options)
    twin = from_swarm(nodes.swarm)
    head = twin.get_output_embeddings()
    with torch.no_grad():
        weight = head.weight.clone()
        weight[40] += 10 * weight[before[0, 9]]  # another token wins now
        head.weight = nn.Parameter(weight)
    changed = twin.generate(IDS[:1], **options)
    assert int(changed[0, 9]) == 40
