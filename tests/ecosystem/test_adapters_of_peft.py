"""One step of training of LoRA in a server's blocks, against peft on the library's whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import LowRank, SpanAdapter
from node.model.adapters.sites import site_paths
from node.model.blocks.forward_backward import backward, forward
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from tests.lora_fixtures import blocks_of
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the package

TOLERANCE = 5e-6  # relative to the largest value
RANK = 4


def attention_sites(block: nn.Module) -> dict[str, str]:
    """Names and paths of the sites that are no part of an MLP or of experts."""
    paths = site_paths(block)
    known = ("attn", "attention", "conv")
    return {name: path for name, path in paths.items() if path.partition(".")[0].endswith(known)}


def with_peft(whole: Any) -> dict[int, dict[str, Any]]:
    """peft's layers at the attention of every block, by block and site, with values in B too."""
    from peft import LoraConfig, inject_adapter_in_model

    modules = {id(module): name for name, module in whole.named_modules()}
    sites = [attention_sites(block) for block in blocks_of(whole)]
    prefixes = [modules[id(block)] for block in blocks_of(whole)]
    targets = [
        f"{prefix}.{path}" for prefix, own in zip(prefixes, sites, strict=True) for path in own.values()
    ]
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, lora_dropout=0.0)
    torch.manual_seed(5)
    inject_adapter_in_model(config, whole)
    found: dict[int, dict[str, Any]] = {
        number: {name: block.get_submodule(path) for name, path in own.items()}
        for number, (block, own) in enumerate(zip(blocks_of(whole), sites, strict=True))
    }
    with torch.no_grad():
        for layers in found.values():
            for layer in layers.values():
                layer.lora_B["default"].weight.normal_(std=0.1)
    return found


def matrices(layers: dict[int, dict[str, Any]]) -> list[nn.Parameter]:
    return [
        each["default"].weight
        for own in layers.values()
        for layer in own.values()
        for each in (layer.lora_A, layer.lora_B)
    ]


@pytest.mark.parametrize("variant", sorted(TINY))
def test_a_step_of_training_is_peft_s(variant: str, tmp_path: Path) -> None:
    whole = save_tiny(variant, tmp_path / "model")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    span = load_span(folder, 0, BLOCKS)
    layers = with_peft(whole)
    adapter = SpanAdapter(
        "a",
        {
            block: {
                name: LowRank(
                    layer.lora_A["default"].weight.detach().clone(),
                    layer.lora_B["default"].weight.detach().clone(),
                    layer.scaling["default"],
                )
                for name, layer in own.items()
            }
            for block, own in layers.items()
        },
    )
    seen: dict[str, Tensor] = {}

    def enter(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["input"] = (args[0] if args else kwargs["hidden_states"]).detach()

    def leave(block: Any, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    blocks_of(whole)[0].register_forward_pre_hook(enter, with_kwargs=True)
    blocks_of(whole)[-1].register_forward_hook(leave)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    target = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    theirs = matrices(layers)
    optimizer = torch.optim.SGD(theirs, lr=0.1)
    with torch.enable_grad():
        whole(ids, use_cache=False)
        (seen["output"] * target).sum().backward()
    optimizer.step()

    trained = AdaptedSpan(span, adapter, trains=True)
    output = forward(AdaptedSpan(span, adapter), seen["input"], 0, BLOCKS)
    expected = seen["output"].detach()
    assert (output - expected).abs().max() <= TOLERANCE * expected.abs().max()
    backward(trained, seen["input"], target, 0, BLOCKS)
    mine = []
    for block, own in adapter.blocks.items():
        for name, low in own.items():
            for value, grad in zip((low.a, low.b), trained.gradients[block][name], strict=True):
                mine.append(value - 0.1 * grad)
    for ours, parameter in zip(mine, theirs, strict=True):
        wanted = parameter.detach()
        assert (ours - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))
    assert len(mine) >= 2 * BLOCKS
