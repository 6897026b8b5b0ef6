"""A prefix over real nodes in this process: the library's tokens and gradients, also where a server ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from client.adapters.adapter import Adapter
from client.adapters.folder import new_adapter, save_adapter
from client.hf import from_swarm
from client.session.trace import Trace
from tests.hf_swarm import Nodes, nodes_of
from tests.lora_fixtures import blocks_of
from tests.model_fixtures import BLOCKS, save_tiny, save_tiny_tokenizer

PROMPT = [5, 6, 7, 8, 9]
COUNT, NEW = 6, 12
TOLERANCE = 2e-5  # relative to the largest value


@dataclass(frozen=True)
class Case:
    whole: Any  # the library's model
    nodes: Nodes
    adapter: Adapter

    @property
    def prefix(self) -> Tensor:
        """The trained tensor, [blocks, 2, virtual tokens, kv_heads, head_dim]."""
        found = self.adapter.tensors.prefix
        assert found is not None
        return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])  # gpt2: positions are learned
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    path = tmp_path_factory.mktemp(request.param) / "model"
    whole = save_tiny(request.param, path)
    save_tiny_tokenizer(path)
    with nodes_of(path, [(0, 2), (2, 6), (2, 6)]) as nodes:
        torch.manual_seed(11)
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": COUNT}
        yield Case(whole, nodes, new_adapter(config, nodes.swarm, dtype="fp32"))


def past_of(values: Tensor, rows: int) -> DynamicCache:
    cache = DynamicCache()
    for block in range(BLOCKS):
        keys, own = (each.transpose(0, 1).expand(rows, -1, -1, -1) for each in values[block])
        cache.update(keys, own, block)
    return cache


def library_tokens(case: Case, *, prefix: bool) -> list[int]:
    """Greedy, with the library's cache."""
    cache = past_of(case.prefix.detach(), 1) if prefix else DynamicCache()
    given, found = torch.tensor([PROMPT]), list[int]()
    with torch.no_grad():
        for _ in range(NEW):
            logits = case.whole(given, past_key_values=cache, use_cache=True).logits
            found.append(int(logits[0, -1].argmax()))
            given = torch.tensor([found[-1:]])
    return found


def swarm_tokens(case: Case, trace: Trace, *, kill_at: int | None = None) -> list[int]:
    """Greedy, over the swarm.  kill_at: the server of the last blocks ends after so many tokens."""
    found = list[int]()
    for token in case.nodes.swarm.generate(
        PROMPT, max_new_tokens=NEW, stop_token_ids=[], do_sample=False, adapter=case.adapter, trace=trace
    ):
        found.append(token.id)
        if len(found) == kill_at:
            (opened,) = trace.of("opened")
            case.nodes.kill(case.nodes.ids.index(opened.data["hops"][-1]["peer"]))
    return found


def whole_gradients(case: Case, ids: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Input and output of all blocks, and the gradients of the input and of the prefix."""
    blocks, seen = blocks_of(case.whole), dict[str, Tensor]()

    def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        seen["input"] = given.detach().clone().requires_grad_()
        if args:
            return (seen["input"], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": seen["input"]}

    def leave(block: Any, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[-1].register_forward_hook(leave),
    ]
    leaves = case.prefix.detach().clone().requires_grad_()
    case.whole(ids, past_key_values=past_of(leaves, len(ids)), use_cache=True)
    gradient, prefix = torch.autograd.grad(seen["output"], [seen["input"], leaves], direction)
    for hook in hooks:
        hook.remove()
    found = {name: each.detach() for name, each in seen.items()}
    return found | {"gradient": gradient, "prefix": prefix}


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def test_gradients_of_a_prefix_are_the_library_s(case: Case) -> None:
    ids = torch.randint(0, 90, (3, 9), generator=torch.Generator().manual_seed(2))
    direction = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(3))
    expected = whole_gradients(case, ids, direction)
    output, kept = case.nodes.swarm.forward_kept(expected["input"], adapter=case.adapter)
    assert error(output, expected["output"]) <= TOLERANCE
    for _ in range(2):  # the tape's, and without one
        found = case.nodes.swarm.gradients(kept, direction)
        assert error(found.hidden, expected["gradient"]) <= TOLERANCE
        assert found.adapter is not None
        case.adapter.add_gradients(found.adapter)
        assert case.prefix.grad is not None
        assert error(case.prefix.grad, expected["prefix"]) <= TOLERANCE
        case.prefix.grad = None
    kept.release()


def test_rows_longer_than_the_model_has_places_after_the_prefix_are_refused(case: Case) -> None:
    most = case.nodes.swarm.info.max_position
    with pytest.raises(ValueError, match=f"positions after a prefix of {COUNT}, the model has {most}"):
        case.nodes.swarm.forward(torch.zeros(1, most - COUNT + 1, 32), adapter=case.adapter)
    with pytest.raises(ValueError, match=f"a prefix takes {COUNT}"):
        case.nodes.swarm.conversation(most - COUNT + 1, adapter=case.adapter)
    case.nodes.swarm.conversation(adapter=case.adapter)  # the usual length leaves room


def test_tokens_after_a_prefix_are_the_library_s_and_stay_so_where_a_server_ends(case: Case) -> None:
    expected = library_tokens(case, prefix=True)
    assert expected != library_tokens(case, prefix=False)
    assert swarm_tokens(case, Trace()) == expected
    trace = Trace()
    assert swarm_tokens(case, trace, kill_at=4) == expected
    assert trace.counts["rerouted"] == 1


def test_the_library_s_model_generates_with_a_prefix_where_positions_are_not_learned(
    case: Case, tmp_path: Path
) -> None:
    save_adapter(case.adapter, tmp_path, dtype="fp32")
    model = from_swarm(case.nodes.swarm)
    if case.whole.config.model_type == "gpt2":
        with pytest.raises(ValueError, match="learned positions"):
            model.load_adapter(tmp_path)
        return
    model.load_adapter(tmp_path)
    given = torch.tensor([PROMPT])
    found = model.generate(given, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0, len(PROMPT) :].tolist() == library_tokens(case, prefix=True)
