"""Prefixes in the caches of every supported architecture, against the library with the same past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from node.config import ConfigError
from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.blobs import read_block, span_adapter
from node.model.adapters.prefix import SpanPrefix, guest_shapes, why_no_prefix
from node.model.blocks import parts
from node.model.blocks.forward_backward import Tape, backward, finish, forward
from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.model.peft.modules import model_modules
from node.model.peft.new import new_adapter
from node.model.peft.tensors import AdapterTensors
from tensor_codec.adapters import PREFIX, AdapterManifest, LoraSite, blob_bytes
from tensor_codec.errors import LocalProtocolError, MessageError
from tests.lora_fixtures import blocks_of
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny

torch.set_num_threads(1)

TOLERANCE = 1e-5  # relative to the largest value; the library masks and sums in another order
GRADIENT_TOLERANCE = 5e-5
SPANS = ((0, 2), (2, BLOCKS))
COUNT = 5  # virtual tokens: no whole page
NONE = {
    "mistral": "blocks of sliding attention",
    "qwen2": "blocks of sliding attention",
    "gemma2": "blocks of sliding attention",
    "gemma3_text": "blocks of sliding attention",
    "phi3": "blocks of sliding attention",
    "gpt_oss": "blocks of sliding attention",
    "cohere2": "blocks of sliding attention",
    "starcoder2": "blocks of sliding attention",
    "deepseek_v3": "(MLA)",
    "llama4_text": "blocks of chunked attention",
    "lfm2": "blocks of conv",
}


@dataclass(frozen=True)
class Case:
    whole: Any  # the library's model
    spans: tuple[Span, ...]
    ends: EmbedAndHead
    prefixes: tuple[AdapterTensors, AdapterTensors]
    held: tuple[list[SpanPrefix], list[SpanPrefix]]  # of each prefix, by span


def config(count: int) -> dict[str, Any]:
    return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": count}


def no_values(path: str) -> dict[str, Tensor]:
    raise AssertionError(path)


def opened(variant: str, path: Any) -> tuple[Any, ModelFolder]:
    whole = save_tiny(variant, path / "model")
    return whole, open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def held_by(span: Span, tensors: AdapterTensors) -> SpanPrefix:
    """The prefix as a server of this span holds it, out of its blobs."""
    content, shapes = tensors.content(), guest_shapes(span)
    blocks = range(span.start, span.stop)
    read = {
        block: read_block(content.manifest.parts(block), shapes[block], tensors.dtype, content.blobs[block])
        for block in blocks
    }
    found = span_adapter(content.id, read)
    assert isinstance(found, SpanPrefix)
    return found


@pytest.fixture(scope="module", params=sorted(TINY.keys() - NONE.keys()))
def case(request, tmp_path_factory) -> Case:
    whole, folder = opened(request.param, tmp_path_factory.mktemp(request.param))
    spans = tuple(load_span(folder, start, stop) for start, stop in SPANS)
    torch.manual_seed(7)
    ends, modules = load_embed_and_head(folder), model_modules(folder)
    first, second = (
        new_adapter(config(count), modules, values=no_values, dtype="fp32") for count in (COUNT, 20)
    )
    held = tuple([held_by(span, each) for span in spans] for each in (first, second))
    return Case(whole, spans, ends, (first, second), (held[0], held[1]))


def past_of(tensors: AdapterTensors | None, rows: int, leaves: Tensor | None = None) -> DynamicCache:
    """The library's cache with the prefix in every row.  leaves: in place of its values."""
    cache = DynamicCache()
    if tensors is not None:
        assert tensors.prefix is not None
        values = tensors.prefix if leaves is None else leaves
        for block in range(BLOCKS):
            keys, own = (each.transpose(0, 1).expand(rows, -1, -1, -1) for each in values[block])
            cache.update(keys, own, block)
    return cache


def ids_of(seed: int, tokens: int, batch: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def whole_logits(case: Case, tensors: AdapterTensors | None, ids: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        found: Tensor = case.whole(ids, past_key_values=past_of(tensors, len(ids)), use_cache=True).logits
        return found


def begin(caches: Sequence[SpanCache], prefixes: Sequence[SpanPrefix] | None) -> int:
    """Put the prefix of each span into its cache; the number of virtual tokens."""
    if prefixes is None:
        return 0
    for cache, own in zip(caches, prefixes, strict=True):
        cache.begin_with(own)
    return prefixes[0].virtual_tokens


def test_sessions_after_other_prefixes_decode_in_one_batch_as_the_library_does(case):
    lengths, more, owners = (5, 9, 1, 4), 2, (0, None, 1, 0)
    ids = [ids_of(10 + length, length + more, 1 + length % 2) for length in lengths]
    pools = [span.new_arena(600) for span in case.spans]
    sessions = [[pool.open(len(row), 64) for pool in pools] for row in ids]
    firsts = [
        begin(caches, None if owner is None else case.held[owner])
        for caches, owner in zip(sessions, owners, strict=True)
    ]
    tensors = [None if owner is None else case.prefixes[owner] for owner in owners]
    for row, caches, length, first, own in zip(ids, sessions, lengths, firsts, tensors, strict=True):
        expected = whole_logits(case, own, row[:, :length])
        for begin_at, stop in ((0, length // 2), (length // 2, length)):  # two chunks
            if begin_at == stop:
                continue
            hidden = case.ends.embed(row[:, begin_at:stop], first + begin_at)
            for span, cache in zip(case.spans, caches, strict=True):
                hidden = span.forward(hidden, cache, begin_at)
            assert error(case.ends.head(hidden), expected[:, begin_at:stop]) <= TOLERANCE
    for step in range(more):
        embedded = [
            case.ends.embed(row[:, length + step :][:, :1], first + length + step)
            for row, length, first in zip(ids, lengths, firsts, strict=True)
        ]
        hidden = torch.cat(embedded)[:, 0]
        for index, span in enumerate(case.spans):
            caches = [session[index] for session in sessions]
            for cache in caches:
                cache.reserve(cache.length + 1)
            hidden = span.decode(hidden, caches, span.start, span.stop)
            for cache in caches:
                cache.length += 1
        logits = case.ends.head(hidden[:, None]).split([len(row) for row in ids])
        for row, length, own, got in zip(ids, lengths, tensors, logits, strict=True):
            text = row[:, : length + step + 1]
            assert error(got, whole_logits(case, own, text)[:, -1:]) <= TOLERANCE
            if own is not None:
                plain = whole_logits(case, None, text)[:, -1:]
                assert error(got, plain) > 0.01, "the prefix changes the answer"


def through_the_whole(case: Case, ids: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Input and output of all blocks after the first prefix, and gradients of the input and the prefix."""
    blocks, seen = blocks_of(case.whole), dict[str, Tensor]()

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
    own = case.prefixes[0]
    assert own.prefix is not None
    leaves = own.prefix.detach().clone().requires_grad_()
    with torch.enable_grad():
        case.whole(ids, past_key_values=past_of(own, len(ids), leaves), use_cache=True)
        gradient, prefix = torch.autograd.grad(seen["output"], [seen["input"], leaves], direction)
    for hook in hooks:
        hook.remove()
    seen = {name: each.detach() for name, each in seen.items()}
    return seen | {"gradient": gradient, "prefix": prefix}


@pytest.mark.parametrize("way", ["in one part", "block by block", "a tape"])
def test_a_backward_gives_the_gradients_of_the_prefix(case, way, monkeypatch):
    monkeypatch.setattr(parts, "PART_POSITIONS", 1 if way == "block by block" else 10**9)
    ids = ids_of(3, 12, 2)
    direction = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(4))
    expected = through_the_whole(case, ids, direction)
    hidden, inputs, grad = expected["input"], [], direction
    trained, tapes = [], [Tape() for _ in case.spans]
    for span, own, tape in zip(case.spans, case.held[0], tapes, strict=True):
        trained.append(AdaptedSpan(span, own, trains=True))
        inputs.append(hidden)
        with torch.inference_mode():  # as in the torch thread of a node
            if way == "a tape":
                hidden = finish(tape.forward_in_parts(trained[-1], hidden, span.start, span.stop))
            else:
                hidden = forward(AdaptedSpan(span, own), hidden, span.start, span.stop)
    assert error(hidden, expected["output"]) <= TOLERANCE
    for span, given, tape in reversed(list(zip(trained, inputs, tapes, strict=True))):
        if way == "a tape":
            grad = finish(tape.backward_in_parts(grad)).hidden
        else:
            grad = backward(span, given, grad, span.span.start, span.span.stop)
    assert error(grad, expected["gradient"]) <= TOLERANCE
    found = {block: pairs for span in trained for block, pairs in span.gradients.items()}
    assert sorted(found) == list(range(BLOCKS))
    for block, pairs in found.items():
        assert set(pairs) == {PREFIX}
        for got, wanted in zip(pairs[PREFIX], expected["prefix"][block], strict=True):
            assert got.dtype == torch.float32
            flat = wanted.reshape(COUNT, -1)
            assert (got - flat).abs().max() <= GRADIENT_TOLERANCE * max(1e-3, float(flat.abs().max()))


@pytest.mark.parametrize("variant", sorted(NONE))
def test_an_architecture_with_another_cache_refuses_in_one_line(variant, tmp_path):
    _, folder = opened(variant, tmp_path)
    span, modules = load_span(folder, 0, 2), model_modules(folder)
    reason = why_no_prefix(span.config)
    assert reason is not None
    assert NONE[variant] in reason
    with pytest.raises(ConfigError, match="the adapter's config: the model takes no prefix: ") as refused:
        new_adapter(config(2), modules, values=no_values)
    assert str(refused.value).endswith(reason)
    for shapes in guest_shapes(span).values():
        with pytest.raises(MessageError, match="a prefix: the cache of this model's blocks takes none"):
            blob_bytes(prefix_parts(), shapes, "fp32")


def prefix_parts() -> tuple[LoraSite, ...]:
    return AdapterManifest("r", "fp32", ((),), "prefix", 2).parts(0)


def test_angles_by_length_refuse(tmp_path):
    from transformers import LlamaConfig

    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    reason = why_no_prefix(LlamaConfig(rope_parameters=scaled, max_position_embeddings=64))
    assert reason is not None
    assert "rotary angles depend on the length" in reason


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Span, list[SpanPrefix]]:
    _, folder = opened("llama", tmp_path_factory.mktemp("llama"))
    span = load_span(folder, 0, BLOCKS)
    torch.manual_seed(8)
    modules = model_modules(folder)
    made = [new_adapter(config(count), modules, values=no_values) for count in (COUNT, 20)]
    return span, [held_by(span, each) for each in made]


def test_a_row_after_a_prefix_has_the_same_bits_alone_and_in_a_batch(llama):
    span, prefixes = llama
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 4, span.hidden_size, generator=generator)
    answers = []
    for together in (True, False):
        pool = span.new_arena(600)
        caches = [pool.open(1, 32) for _ in range(3)]
        for cache, own in zip(caches, (prefixes[0], None, prefixes[1]), strict=True):
            if own is not None:
                cache.begin_with(own)
        for row, cache in zip(hidden, caches, strict=True):
            span.forward(row[None, :3], cache, 0)
            cache.reserve(4)
        rows = hidden[:, 3]
        if together:
            answers.append(span.decode(rows, caches, 0, BLOCKS))
        else:
            alone = zip(rows, caches, strict=True)
            answers.append(torch.cat([span.decode(row[None], [cache], 0, BLOCKS) for row, cache in alone]))
    assert torch.equal(*answers)


def test_a_cut_keeps_the_prefix_and_its_pages_alone(llama):
    span, prefixes = llama
    pool = span.new_arena(600)
    cache = pool.open(2, 64)
    free = pool.free_tokens
    cache.begin_with(prefixes[1])
    assert free - pool.free_tokens == 2 * 32  # 20 virtual tokens of two rows, in pages of 16
    hidden = torch.randn(2, 30, span.hidden_size, generator=torch.Generator().manual_seed(2))
    first = span.forward(hidden, cache, 0)
    assert free - pool.free_tokens == 2 * 64
    cache.cut(0)
    assert free - pool.free_tokens == 2 * 32
    assert torch.equal(span.forward(hidden, cache, 0), first)
    cache.cut(7)
    assert torch.allclose(span.forward(hidden[:, 7:], cache, 7), first[:, 7:], atol=1e-5)
    cache.close()
    assert pool.free_tokens == free


def test_rows_that_are_chosen_again_take_their_prefix_with_them(llama):
    span, prefixes = llama
    cache = span.new_arena(600).open(3, 32)
    cache.begin_with(prefixes[0])
    hidden = torch.randn(3, 5, span.hidden_size, generator=torch.Generator().manual_seed(3))
    span.forward(hidden[:, :3], cache, 0)
    cache.select([2, 2, 0])
    order = torch.tensor([2, 2, 0])
    got = span.forward(hidden[:, 3:], cache, 3)
    other = span.new_arena(600).open(3, 32)
    other.begin_with(prefixes[0])
    span.forward(hidden[order, :3], other, 0)
    assert torch.allclose(got, span.forward(hidden[:, 3:], other, 3), atol=1e-6)


def test_a_prefix_comes_before_everything_and_once(llama):
    span, prefixes = llama
    cache = span.new_cache(1, 32)
    cache.begin_with(prefixes[0])
    with pytest.raises(LocalProtocolError, match="a prefix in a cache of 0 tokens"):
        cache.begin_with(prefixes[0])


def test_a_prefix_of_other_shapes_or_values_is_refused(llama):
    span, _ = llama
    shapes, sites = guest_shapes(span)[0], prefix_parts()
    size = blob_bytes(sites, shapes, "fp32")
    assert size == 2 * 2 * 16 * 4  # keys and values, two tokens, two heads of 8
    with pytest.raises(MessageError, match=f"{size - 4} bytes, its sites take {size}"):
        read_block(sites, shapes, "fp32", bytes(size - 4))
    for value in (float("nan"), 1.1e4):
        spoilt = torch.full((size // 4,), value).numpy().tobytes()
        with pytest.raises(MessageError, match=r"NaN or infinity|10000 is the largest"):
            read_block(sites, shapes, "fp32", spoilt)
