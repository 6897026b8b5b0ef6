"""LoRA inside the servers' blocks, by the library's own methods: as in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import client
from client.hf import AutoDistributedModelForSequenceClassification, RemoteCache, from_swarm
from node.config import ConfigError
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import load_embed_and_head
from tests.hf_swarm import Nodes, nodes_of
from tests.model_fixtures import save_tiny, save_tiny_tokenizer
from tests.plain_lora import PlainLora

IDS = torch.arange(3, 21).view(2, 9)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
EVERYWHERE = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "modules_to_save": ["lm_head", "model.norm"], "rank_pattern": {"layers.4.self_attn.q_proj": 2},
    "use_rslora": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    with nodes_of(folder, [(0, 3), (3, 6)]) as nodes:
        yield nodes


def local(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def shake(model: Any) -> None:
    """Move every value of the adapter in use, so that it changes the text."""
    torch.manual_seed(5)
    with torch.no_grad():
        for each in model.get_adapter().parameters():
            each.add_(torch.randn_like(each) * 0.3)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [CONFIG, EVERYWHERE], ids=["attention", "everywhere"])
def test_lora_learns_as_in_one_process(nodes: Nodes, folder: Path, config: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    model = from_swarm(nodes.swarm)
    model.add_adapter(config, dtype=dtype)
    plain = PlainLora(local(folder), model.get_adapter(), rounded=dtype == "bf16")
    own = {id(each) for each in model.parameters() if each.requires_grad}
    named = model.get_adapter().named_parameters()
    assert own == {id(each) for each in named.values()}
    mine, theirs = list(named.values()), [plain.values[name] for name in named]
    optimizers, losses = (adamw(mine), adamw(theirs)), []
    for _ in range(4):
        loss, expected = model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for optimizer, one in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            one.backward()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_a_saved_adapter_generates_what_one_process_generates(
    nodes: Nodes, folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = from_swarm(nodes.swarm)
    without = model.generate(IDS, **GREEDY)
    model.add_adapter(EVERYWHERE, dtype="fp32")
    assert torch.equal(model.generate(IDS, **GREEDY), without)  # it has changed nothing yet
    shake(model)
    model.save_pretrained(tmp_path)
    again = from_swarm(nodes.swarm)
    again.load_adapter(tmp_path)
    assert not [each for each in again.parameters() if each.requires_grad]
    plain = PlainLora(local(folder), again.get_adapter())
    expected = plain.model.generate(IDS, **GREEDY)
    assert not torch.equal(expected, without)
    for one in (model, again):
        assert torch.equal(one.generate(IDS, **GREEDY), expected)
        assert torch.equal(one.generate(IDS, use_cache=False, **GREEDY), expected)
        assert torch.equal(one.generate(IDS[:1], **GREEDY), expected[:1])  # not by the client's own loop
    torch.testing.assert_close(again(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_row_generates_by_both_loops_alike(nodes: Nodes, folder: Path) -> None:
    model = from_swarm(nodes.swarm)
    model.add_adapter(CONFIG, dtype="fp32")
    shake(model)
    plain = PlainLora(local(folder), model.get_adapter())
    expected = plain.model.generate(IDS[:1], **GREEDY)
    assert torch.equal(model.generate(IDS[:1], **GREEDY), expected)
    slow = model.generate(IDS[:1], output_scores=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(slow.sequences, expected)


@torch.no_grad()
def test_a_head_that_is_replaced_is_not_computed_with_the_loaded_weights(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    plain = model(IDS).logits
    model.add_adapter({**CONFIG, "modules_to_save": ["lm_head"]})
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
    head = model.get_adapter().tensors.ends["lm_head"].values["weight"]
    head.data.mul_(2.0)  # past torch's count of changes
    torch.testing.assert_close(model(IDS).logits, 2 * plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_values_that_changed_past_torch_s_count_are_those_that_are_computed_with(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    model.add_adapter({"r": 4, "target_modules": "all-linear"})
    plain = model(IDS).logits
    text = model.generate(IDS[:1], **GREEDY)
    torch.manual_seed(5)
    for each in model.get_adapter().parameters():
        each.data.add_(torch.randn_like(each) * 0.3)
    assert not torch.equal(model.generate(IDS[:1], **GREEDY), text)
    for each in model.get_adapter().parameters():
        each.data.zero_()
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_client_s_own_loop_is_left_to_adapters_of_blocks_alone(nodes: Nodes, folder: Path) -> None:
    model = from_swarm(nodes.swarm)
    model.add_adapter({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}, dtype="fp32")
    shake(model)
    plain = PlainLora(local(folder), model.get_adapter())
    expected = plain.model.generate(IDS[:1], **GREEDY)
    assert torch.equal(model.generate(IDS[:1], **GREEDY), expected)
    shake(model)
    expected = PlainLora(local(folder), model.get_adapter()).model.generate(IDS[:1], **GREEDY)
    assert torch.equal(model.generate(IDS[:1], **GREEDY), expected)


@torch.no_grad()
def test_a_cache_goes_on_with_the_adapter_that_it_was_filled_with_alone(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    model.add_adapter(CONFIG, "one")
    shake(model)
    for ids in (IDS, IDS[:1]):  # by the library's loop, and by the client's own
        cache = RemoteCache(model.swarm, 64)
        text = model.generate(ids, past_key_values=cache, **GREEDY)
        more = torch.cat([text, text[:, :1]], 1)
        model.disable_adapters()
        with pytest.raises(ValueError, match="the cache was filled with another adapter"):
            model.generate(more, past_key_values=cache, **GREEDY)
        model.enable_adapters()
        text = model.generate(more, past_key_values=cache, **GREEDY)
        assert text.shape[1] > more.shape[1]
        shake(model)
        more = torch.cat([text, text[:, :1]], 1)
        with pytest.raises(ValueError, match="or with other values of it"):
            model.generate(more, past_key_values=cache, **GREEDY)
        cache.close()


@torch.no_grad()
def test_the_adapter_in_use_is_chosen_by_its_name(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()
    plain = model(IDS).logits
    logits = {}
    for name in ("one", "two"):
        model.add_adapter({**EVERYWHERE, "r": 4 if name == "one" else 2}, name)
        shake(model)
        logits[name] = model(IDS).logits
        assert model.active_adapters() == [name]
    assert not torch.equal(logits["one"], logits["two"])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(model(IDS).logits, logits[name])
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, plain)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, logits["one"])
    with pytest.raises(ValueError, match="Adapter with name three not found"):
        model.set_adapter("three")
    with pytest.raises(ValueError, match="2 adapters at a time: a request has one"):
        model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(CONFIG, "two")
    model.delete_adapter("one")
    assert torch.equal(model(IDS).logits, plain)
    model.set_adapter("two")
    assert torch.equal(model(IDS).logits, logits["two"])


def test_a_config_that_is_not_computed_is_refused_by_its_field_and_leaves_the_model(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    for wrong in ({"use_dora": True}, {"bias": "all"}, {"target_modules": ["input_layernorm"]}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            model.add_adapter({**CONFIG, **wrong})
    model.add_adapter(CONFIG)
    assert model.active_adapters() == ["default"]


def test_a_prompt_of_peft_s_form_stands_in_front_of_the_text(nodes: Nodes, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = from_swarm(nodes.swarm)
    model.add_adapter({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3})
    shake(model)
    soft = model.get_adapter().tensors.prompt
    other = from_swarm(nodes.swarm, tuning_mode="ptune", pre_seq_len=3)
    with torch.no_grad():
        other.base_model.prompts.soft.copy_(soft)
    assert torch.equal(model(IDS, labels=IDS).loss, other(IDS, labels=IDS).loss)
    assert torch.equal(model.generate(IDS, **GREEDY), other.generate(IDS, **GREEDY))
    model(IDS, labels=IDS).loss.backward()
    assert soft.grad is not None
    model.save_pretrained(tmp_path)
    again = from_swarm(nodes.swarm)
    again.load_adapter(tmp_path)
    assert torch.equal(again.generate(IDS, **GREEDY), other.generate(IDS, **GREEDY))
    with pytest.raises(ValueError, match="a soft prompt of its own"):
        other.load_adapter(tmp_path)


def test_a_head_for_classification_learns_with_lora_in_the_blocks(nodes: Nodes, tmp_path: Path) -> None:
    torch.manual_seed(3)
    task = AutoDistributedModelForSequenceClassification
    model = from_swarm(nodes.swarm, task=task, num_labels=3, pad_token_id=0)
    model.add_adapter({**CONFIG, "task_type": "SEQ_CLS"})
    optimizer, losses = adamw([each for each in model.parameters() if each.requires_grad]), []
    for _ in range(6):
        loss = model(IDS, labels=torch.tensor([0, 2])).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert any(each.grad.any() for each in model.get_adapter().parameters())
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= names


def plainly_trained(folder: Path, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The same in one process."""
    torch.manual_seed(4)
    model = local(folder)
    ends = load_embed_and_head(resolve(str(folder), cache_dir=folder))
    plain = PlainLora(model, client.new_adapter(CONFIG, ends, dtype="fp32"))
    optimizer, losses = adamw(plain.parameters()), []
    for _ in range(steps):
        loss = plain(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [each.detach() for each in plain.parameters()]


def trained(nodes: Nodes, steps: int, kill: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """The losses and the values of some steps of training.  kill: called with the number of a step."""
    torch.manual_seed(4)
    model = from_swarm(nodes.swarm)
    model.add_adapter(CONFIG, dtype="fp32")
    optimizer, losses = adamw(model.get_adapter().parameters()), []
    for step in range(steps):
        loss = model(IDS, labels=IDS).loss
        if kill is not None:
            kill(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [each.detach().clone() for each in model.get_adapter().parameters()]


def test_deaths_of_servers_change_no_bit_of_twenty_steps(folder: Path) -> None:
    random = Random(7)
    spans = [(0, 2), (2, 4), (4, 6)]
    with nodes_of(folder, spans * 3) as nodes:
        losses, values = trained(nodes, 20)
        deaths = sorted(random.sample(range(1, 20), 5))
        killed: list[int] = []

        def kill_a_server_in_use(step: int) -> None:
            if step in deaths:
                used = [nodes.ids.index(hop.peer) for hop in nodes.swarm.route().hops]
                left = [number for number in range(9) if number not in killed]
                copies = [sum(number % 3 == span for number in left) for span in range(3)]
                spare = [number for number in left if copies[number % 3] > 1]
                # The route may still name a server that is dead: then any of the living is killed.
                victim = random.choice([number for number in used if number in spare] or spare)
                killed.append(victim)
                nodes.kill(victim)

        mine, own = trained(nodes, 20, kill_a_server_in_use)
    assert len(killed) == len(deaths) == 5
    assert all(torch.equal(*pair) for pair in zip(losses, mine, strict=True))
    assert all(torch.equal(*pair) for pair in zip(values, own, strict=True))
    expected, theirs = plainly_trained(folder, 20)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values, theirs, rtol=0, atol=1e-6)


def test_threads_train_micro_batches_of_one_step_at_a_time(nodes: Nodes) -> None:
    model = from_swarm(nodes.swarm)
    model.add_adapter(CONFIG, dtype="fp32")
    shake(model)
    parameters = model.get_adapter().parameters()

    def back(rows: Tensor) -> None:
        (model(rows, labels=rows).loss / len(rows)).backward()

    for row in IDS.split(1):
        back(row)
    expected = [each.grad.clone() for each in parameters]
    model.zero_grad()
    threads = [threading.Thread(target=back, args=(row,)) for row in IDS.split(1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([each.grad for each in parameters], expected, rtol=1e-5, atol=1e-7)


def test_a_program_without_the_library_trains_and_generates(
    nodes: Nodes, folder: Path, tmp_path: Path
) -> None:
    swarm = nodes.swarm
    torch.manual_seed(6)
    adapter = client.new_adapter(CONFIG, swarm, dtype="fp32")
    plain = PlainLora(local(folder), adapter)
    theirs = list(plain.parameters())
    trainer = client.train_sync(swarm, adapter, adamw(adapter.parameters()))
    optimizer = adamw(theirs)
    whole = plain.model
    for _ in range(3):
        optimizer.zero_grad()
        expected = whole(IDS, labels=IDS).loss
        expected.backward()
        optimizer.step()
        with trainer.step() as step:
            output = step.forward(whole.model.embed_tokens(IDS)).requires_grad_()
            logits = whole.lm_head(whole.model.norm(output))
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            step.backward(torch.autograd.grad(loss, output)[0])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert trainer.steps == 3
    torch.testing.assert_close(adapter.parameters(), theirs, rtol=1e-3, atol=1e-5)
    client.save_adapter(adapter, tmp_path)
    loaded = client.load_adapter(tmp_path, swarm)
    ids = [int(each) for each in IDS[0]]
    tokens = [token.id for token in swarm.generate(ids, adapter=loaded, max_new_tokens=6, temperature=0)]
    with torch.no_grad():
        expected_ids = plain.model.generate(IDS[:1], **{**GREEDY, "eos_token_id": None})[0, 9:].tolist()
    assert tokens == expected_ids[: len(tokens)]
    assert tokens
