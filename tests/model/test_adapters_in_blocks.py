"""Adapters in the blocks of every supported architecture, against the whole model with changed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.low_rank import SpanAdapter
from node.model.adapters.sites import site_paths, site_shapes
from node.model.blocks import parts
from node.model.blocks.forward_backward import backward, forward
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from tensor_codec.errors import LocalProtocolError
from tests.lora_fixtures import blocks_of, merged, random_adapter
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny

torch.set_num_threads(1)

# Relative to the largest value.  W x + B (A x) and (W + B A) x are other sums; 4e-6 was the worst seen.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5  # 1e-5 was the worst seen, on glm4 with its four norms
SPANS = ((0, 2), (2, BLOCKS))


@dataclass(frozen=True)
class Case:
    variant: str
    whole: Any  # the library's model
    folder: ModelFolder
    spans: tuple[Span, ...]
    ends: EmbedAndHead
    adapters: tuple[SpanAdapter, SpanAdapter]  # for all blocks; the second one at every other site


@pytest.fixture(scope="module", params=sorted(TINY))
def case(request, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp(request.param)
    whole = save_tiny(request.param, path / "model")
    folder = open_folder(path / "model", memo=HashMemo(path / "hashes.json"))
    spans = tuple(load_span(folder, start, stop) for start, stop in SPANS)
    shapes = {block: own for span in spans for block, own in site_shapes(span).items()}
    every_other = list(shapes[0])[::2]
    adapters = (
        random_adapter(shapes, 1),
        random_adapter(shapes, 2, rank=1, dtype=torch.bfloat16, at=lambda name: name in every_other),
    )
    return Case(request.param, whole, folder, spans, load_embed_and_head(folder), adapters)


def part_of(adapter: SpanAdapter | None, span: Span) -> SpanAdapter | None:
    """The adapter as a server of this span holds it."""
    if adapter is None:
        return None
    blocks = range(span.start, span.stop)
    return SpanAdapter(adapter.id, {block: adapter.blocks[block] for block in blocks})


def ids_of(seed: int, tokens: int, batch: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def whole_logits(case: Case, adapter: SpanAdapter | None, ids: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), merged(case.whole, adapter):
        return case.whole(ids, use_cache=False).logits


def test_attention_has_sites_and_experts_have_none(case):
    for span in case.spans:
        for block, module in enumerate(span.architecture.blocks_of(span.model), span.start):
            paths = site_paths(module)
            assert not any("experts" in path.split(".") or path.endswith("router") for path in paths.values())
            assert site_paths(blocks_of(case.whole)[block]) == paths, "a model without blocks' weights agrees"
            assert any("att" in path or "Wqkv" in path or "conv" in path for path in paths.values())
            assert all(name.isidentifier() for name in paths)


def test_sessions_with_other_adapters_decode_in_one_batch_as_each_does_alone(case):
    first, second = case.adapters
    lengths, more, owners = (5, 9, 1, 4), 2, (first, None, second, first)
    ids = [ids_of(10 + length, length + more, 1 + length % 2) for length in lengths]
    pools = [span.new_arena(400) for span in case.spans]
    sessions = [[pool.open(len(row), 64) for pool in pools] for row in ids]
    for row, caches, length, adapter in zip(ids, sessions, lengths, owners, strict=True):
        hidden = case.ends.embed(row[:, :length], 0)
        for span, cache in zip(case.spans, caches, strict=True):
            hidden = span.forward(hidden, cache, 0, adapter=part_of(adapter, span))
        assert error(case.ends.head(hidden), whole_logits(case, adapter, row[:, :length])) <= TOLERANCE
    for step in range(more):
        embedded = [
            case.ends.embed(row[:, length + step :][:, :1], length + step)
            for row, length in zip(ids, lengths, strict=True)
        ]
        hidden = torch.cat(embedded)[:, 0]
        for index, span in enumerate(case.spans):
            caches = [session[index] for session in sessions]
            for cache in caches:
                cache.reserve(cache.length + 1)
            own = [part_of(adapter, span) for adapter in owners]
            hidden = span.decode(hidden, caches, span.start, span.stop, adapters=own)
            for cache in caches:
                cache.length += 1
        logits = case.ends.head(hidden[:, None]).split([len(row) for row in ids])
        for row, length, adapter, got in zip(ids, lengths, owners, logits, strict=True):
            expected = whole_logits(case, adapter, row[:, : length + step + 1])[:, -1:]
            assert error(got, expected) <= TOLERANCE
            if adapter is not None:
                plain = whole_logits(case, None, row[:, : length + step + 1])[:, -1:]
                assert error(got, plain) > 0.01, "the adapter changes the answer"


def through_the_whole(
    case: Case, ids: Tensor, direction: Tensor
) -> tuple[dict[str, Tensor], dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """Input and output of all blocks, and gradients: of the input, and of A and B of every block and site."""
    blocks, seen = blocks_of(case.whole), dict[str, Tensor]()
    leaves: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def enter(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = args[0] if args else kwargs["hidden_states"]
        seen["input"] = given.detach().clone().requires_grad_()
        if args:
            return (seen["input"], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": seen["input"]}

    def leave(block: Any, args: tuple, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[-1].register_forward_hook(leave),
    ]
    with torch.enable_grad(), merged(case.whole, case.adapters[0], leaves):
        case.whole(ids, use_cache=False)
        flat = [each for pair in leaves.values() for each in pair]
        found = torch.autograd.grad(
            seen["output"], [seen["input"], *flat], direction, allow_unused=True, materialize_grads=True
        )
    for hook in hooks:
        hook.remove()
    pairs = zip(found[1::2], found[2::2], strict=True)
    seen |= {"input": seen["input"].detach(), "output": seen["output"].detach(), "gradient": found[0]}
    return seen, dict(zip(leaves, pairs, strict=True))


@pytest.mark.parametrize("most", [10**9, 1])
def test_a_backward_gives_the_gradients_of_the_adapter_s_matrices(case, most, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", most)
    ids = ids_of(3, 12, 2)
    direction = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(4))
    expected, matrices = through_the_whole(case, ids, direction)
    hidden, inputs, grad = expected["input"], [], direction
    trained = []
    for span in case.spans:
        own = part_of(case.adapters[0], span)
        assert own is not None
        trained.append(AdaptedSpan(span, own, trains=True))
        inputs.append(hidden)
        with torch.inference_mode():  # as in the torch thread of a node
            hidden = forward(AdaptedSpan(span, own), hidden, span.start, span.stop)
    assert error(hidden, expected["output"]) <= TOLERANCE
    for span, given in reversed(list(zip(trained, inputs, strict=True))):
        grad = backward(span, given, grad, span.span.start, span.span.stop)
    assert error(grad, expected["gradient"]) <= TOLERANCE
    found = {block: pairs for span in trained for block, pairs in span.gradients.items()}
    assert sorted(found) == list(range(BLOCKS))
    for block, pairs in found.items():
        assert set(pairs) == set(case.adapters[0].blocks[block])
        for name, pair in pairs.items():
            for got, wanted in zip(pair, matrices[block, name], strict=True):
                assert got.dtype == torch.float32
                assert (got - wanted).abs().max() <= GRADIENT_TOLERANCE * max(1e-3, float(wanted.abs().max()))


def test_an_adapter_that_lacks_a_block_of_the_run_is_our_own_fault(case):
    span = case.spans[1]
    own = part_of(case.adapters[0], case.spans[0])
    hidden = torch.zeros(1, 2, 32)
    with pytest.raises(LocalProtocolError, match="is here for blocks 0:2, not for 2"):
        span.forward(hidden, span.new_cache(1, 8), 0, adapter=own)
