"""Rows with other adapters in one batch of our own block: bits, ways, packed weights; blobs and sites."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from node.model.adapters.adapted import AdaptedSpan
from node.model.adapters.blobs import read_lora
from node.model.adapters.hooks import adapted
from node.model.adapters.low_rank import AdapterGradients, Group, LowRank, SpanAdapter, groups_of, part_of
from node.model.adapters.sites import shapes_of, site_shapes, sites_of
from node.model.blocks.forward_backward import backward, finish, forward
from node.model.blocks.kv_pages import SpanCache
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.weights.quantize import PackedLinear
from node.serving.forward_backward import Work
from tensor_codec.adapters import LoraSite
from tensor_codec.blocks import Blocks
from tensor_codec.codecs import decode_hidden, encode_hidden
from tensor_codec.errors import LocalProtocolError, MessageError
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.forward_backward import Backward, Forward, Run
from tensor_codec.span_spec import SpanSpec
from tests.lora_fixtures import random_adapter
from tests.model_fixtures import BLOCKS, save_tiny

torch.set_num_threads(1)

KINDS = [(torch.float32, "none"), (torch.float32, "int8"), (torch.bfloat16, "none")]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def folder(request, tmp_path_factory) -> ModelFolder:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def saved(variant, path) -> ModelFolder:
    save_tiny(variant, path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).float().norm() / expected.float().norm())


class Batch:
    """Sessions of different lengths with an adapter each, or with none."""

    def __init__(self, span: Span, owners: Sequence[SpanAdapter | None]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.span, self.owners = span, tuple(owners)
        lengths = [5, 30, 1, 16, 9, 2][: len(owners)]
        self.prompts = [torch.randn(1, length, span.hidden_size, generator=generator) for length in lengths]
        self.rows = torch.randn(len(owners), span.hidden_size, generator=generator)
        self.pool = span.new_arena(2000)

    def opened(self, owners: Sequence[SpanAdapter | None] | None = None) -> list[SpanCache]:
        """Caches with the prompts in them."""
        caches = []
        for prompt, owner in zip(self.prompts, owners or self.owners, strict=True):
            cache = self.pool.open(1, 64)
            self.span.forward(prompt, cache, 0, adapter=owner)
            cache.reserve(cache.length + 1)
            caches.append(cache)
        return caches

    def together(self, owners: Sequence[SpanAdapter | None] | None = None) -> Tensor:
        """One position of each."""
        own = owners or self.owners
        return self.span.decode(self.rows, self.opened(own), 0, BLOCKS, adapters=own)

    def alone(self) -> Tensor:
        """The same, each by itself."""
        return torch.cat(
            [
                self.span.decode(self.rows[i : i + 1], [cache], 0, BLOCKS, adapters=[owner])
                for i, (cache, owner) in enumerate(zip(self.opened(), self.owners, strict=True))
            ]
        )


def batch_of(folder: ModelFolder, dtype: torch.dtype, quantize: str) -> Batch:
    span = load_span(folder, 0, BLOCKS, dtype=dtype, quantize=quantize)
    one = random_adapter(site_shapes(span), 1, rank=8)
    two = random_adapter(site_shapes(span), 2, rank=3, dtype=torch.bfloat16)
    few = random_adapter(site_shapes(span), 3, at=lambda name: name in ("q_proj", "v_proj", "c_attn"))
    return Batch(span, (one, None, two, one, few, None))


@pytest.mark.parametrize(("dtype", "quantize"), KINDS)
def test_a_row_has_the_same_bits_alone_and_among_rows_with_other_adapters(folder, dtype, quantize):
    batch = batch_of(folder, dtype, quantize)
    if batch.span.dtype != torch.float32 or not batch.span.fused:
        pytest.skip("computed by torch, whose products of more rows may be other sums")
    assert torch.equal(batch.together(), batch.alone())


@pytest.mark.parametrize(("dtype", "quantize"), KINDS)
def test_rows_without_an_adapter_keep_the_bits_of_a_span_without_adapters(folder, dtype, quantize):
    batch = batch_of(folder, dtype, quantize)
    plain = Batch(batch.span, [None] * 6)
    expected = plain.span.decode(plain.rows, plain.opened(), 0, BLOCKS)
    got = batch.together()
    if batch.span.fused or len({cache.length for cache in plain.opened()}) == 1:
        for row in (1, 5):
            assert torch.equal(got[row], expected[row])
    for row in (1, 5):
        assert error(got[row], expected[row]) < 1e-5
    for row in (0, 2, 3, 4):
        assert error(got[row], expected[row]) > 0.01, "an adapter changes its row"


def test_the_compiled_way_and_torchs_own_give_the_same(folder, monkeypatch):
    batch = batch_of(folder, torch.float32, "none")
    if not batch.span.fused:
        pytest.skip("the library computes this one")
    compiled = batch.together()
    monkeypatch.setattr(type(batch.span._fused), "_compiled", lambda self, hidden: False)
    assert error(batch.together(), compiled) < 3e-6
    batch.span._fused = None
    assert error(batch.together(), compiled) < 3e-6, "and so does the library"


def test_a_long_prompt_through_compiled_halves_has_its_adapter(folder):
    span = load_span(folder, 0, BLOCKS, quantize="int8")
    adapter = random_adapter(site_shapes(span), 1, rank=8)
    hidden = torch.randn(2, 40, span.hidden_size, generator=torch.Generator().manual_seed(5))
    got = span.forward(hidden, span.new_cache(2, 64), 0, adapter=adapter)
    span._fused = None
    expected = span.forward(hidden, span.new_cache(2, 64), 0, adapter=adapter)
    # Rows are rounded to 16 bits, one of another last bit otherwise.  One way may attend to keys and values
    # before they are rounded for the cache.
    assert error(got, expected) < 5e-3
    assert error(got, span.forward(hidden, span.new_cache(2, 64), 0)) > 0.01


def test_a_session_with_prompts_has_its_adapter_too(folder):
    span = load_span(folder, 1, 4)
    adapter = random_adapter(site_shapes(span), 1)
    generator = torch.Generator().manual_seed(6)
    hidden, prompts = torch.randn(2, 9, 32, generator=generator), torch.randn(3, 4, 32, generator=generator)
    expected = forward(AdaptedSpan(span, adapter), hidden, 1, 4, prompts)
    got = span.forward(hidden, span.new_cache(2, 16), 0, prompts=prompts, adapter=adapter)
    assert error(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("rounds", "most"), [(False, 1e-3), (True, 4e-3)], ids=["float32", "a CPU that multiplies bfloat16"]
)
def test_gradients_through_packed_int8_are_those_of_its_weights_in_float32(folder, rounds, most, monkeypatch):
    monkeypatch.setattr("node.model.weights.quantize.multiplies_bfloat16", lambda: rounds)
    packed, plain = load_span(folder, 0, 3, quantize="int8"), load_span(folder, 0, 3)
    layers = {name: each for name, each in packed.model.named_modules() if isinstance(each, PackedLinear)}
    for name, layer in layers.items():
        own = plain.model.get_submodule(name)
        weight = layer.dequantized(torch.float32)
        own.weight.data = weight.T.contiguous() if type(own).__name__ == "Conv1D" else weight
    adapter = random_adapter(site_shapes(plain), 1, rank=4)
    assert site_shapes(packed) == site_shapes(plain)
    hidden, grad = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(7))
    found = []
    for span in (packed, plain):
        trained = AdaptedSpan(span, adapter, trains=True)
        found.append((backward(trained, hidden, grad, 0, 3), trained.gradients))
    # x is rounded to 16 bits on the way forward, and some CPUs round gradients: see PackedLinear.back.
    assert error(found[0][0], found[1][0]) < most
    for block, pairs in found[0][1].items():
        for name, pair in pairs.items():
            for got, expected in zip(pair, found[1][1][block][name], strict=True):
                assert error(got, expected) < most


def test_a_backward_without_gradients_of_the_adapter_computes_none_of_them(folder):
    span = load_span(folder, 0, 2)
    adapter = random_adapter(site_shapes(span), 1)
    hidden, grad = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(8))
    kept = AdaptedSpan(span, adapter)
    trained = AdaptedSpan(span, adapter, trains=True)
    assert torch.equal(backward(kept, hidden, grad, 0, 2), backward(trained, hidden, grad, 0, 2))
    assert kept.gradients == {}
    assert not any(low.a.requires_grad for low in adapter.blocks[0].values())


def test_a_request_with_an_adapter_is_answered_with_it_and_gives_the_adapter_s_gradients(folder):
    span = load_span(folder, 0, 3)
    adapter = random_adapter(site_shapes(span), 1)
    hidden, grad = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(9))
    contract = Contract(b"", 0, 3, 2, 5, 32, "fp32", 64)
    run = Run(SpanSpec("m", "r", Blocks(0, 3), "float32", adapter.id), 2, "fp32")
    bodies = bytes(encode_hidden(hidden, "fp32")), bytes(encode_hidden(grad, "fp32"))
    answer = finish(Work(Forward(run, bodies[0]), contract, adapter=adapter)(span))
    assert torch.equal(decode_hidden(answer, contract), forward(AdaptedSpan(span, adapter), hidden, 0, 3))
    taken: list[AdapterGradients] = []
    work = Work(Backward(run, *bodies), contract, adapter=adapter, take=taken.append)
    trained = AdaptedSpan(span, adapter, trains=True)
    expected = backward(trained, hidden, grad, 0, 3)
    assert torch.equal(decode_hidden(finish(work(span)), contract), expected)
    (found,) = taken
    for block in range(3):
        for name, pair in trained.gradients[block].items():
            assert all(torch.equal(*each) for each in zip(pair, found[block][name], strict=True))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_values_that_overflow_spoil_the_rows_of_their_adapter_alone(folder, quantize):
    span = load_span(folder, 0, BLOCKS, quantize=quantize)
    if not span.fused:
        pytest.skip("torch's products of more rows may be other sums")

    def huge(ins: int, outs: int) -> LowRank:
        return LowRank(torch.full((4, ins), 1e30), torch.full((outs, 4), 1e30), 1e4)

    own = {block: {name: huge(*shape) for name, shape in sites.items()}
           for block, sites in site_shapes(span).items()}  # fmt: skip
    wild = SpanAdapter("wild", own)
    batch = Batch(span, (None, wild, None, wild, None, None))
    plain = Batch(span, [None] * 6)
    got = batch.together()
    expected = plain.span.decode(plain.rows, plain.opened(), 0, BLOCKS)
    for row in (0, 2, 4, 5):
        assert torch.equal(got[row], expected[row])
    assert not torch.isfinite(got[1]).all()


def test_groups_are_runs_of_rows_with_one_adapter():
    one, two = (SpanAdapter(name, {0: {}}) for name in "ab")
    groups = groups_of([None, one, one, two, None, one], [2, 1, 3, 1, 1, 2])
    assert groups == (Group(one, 2, 6), Group(two, 6, 7), Group(one, 8, 10))
    assert part_of(groups, 3, 9) == (Group(one, 0, 3), Group(two, 3, 4), Group(one, 5, 6))
    assert part_of(groups, 0, 2) == ()


def test_hooks_are_gone_after_the_step_and_after_a_fault(folder):
    span = load_span(folder, 0, 1)
    block = span.architecture.blocks_of(span.model)[0]
    low = LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)
    stranger = SpanAdapter("s", {0: {"no_such_proj": low}})
    with pytest.raises(LocalProtocolError, match="an adapter's site 'no_such_proj', block 0 has none"):
        forward(AdaptedSpan(span, stranger), torch.zeros(1, 2, 32), 0, 1)
    with adapted({0: block}, (Group(random_adapter(site_shapes(span), 1), 0, 1),), 1):
        assert all(each._forward_hooks for each in sites_of(block).values())
    assert not any(each._forward_hooks for each in block.modules())


class Twice(nn.Module):
    """A block with two linears of one name, experts and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_proj": nn.Linear(2, 3), "q_proj": nn.Linear(2, 4)})
        self.mlp = nn.ModuleDict({"c_proj": nn.Linear(5, 2), "gate": nn.Linear(2, 2)})
        self.experts = nn.ModuleList([nn.Linear(2, 2)])


def test_linears_of_one_name_are_told_apart_and_experts_are_no_sites():
    assert shapes_of(Twice()) == {"attn_c_proj": (2, 3), "q_proj": (2, 4), "mlp_c_proj": (5, 2)}
    with torch.device("meta"):
        assert shapes_of(Twice()) == {"attn_c_proj": (2, 3), "q_proj": (2, 4), "mlp_c_proj": (5, 2)}


SHAPES = {"q_proj": (4, 6), "v_proj": (4, 2)}
SITES = (LoraSite("q_proj", 2, 0.5), LoraSite("v_proj", 1, 2.0))
VALUES = 2 * (4 + 6) + 1 * (4 + 2)


def test_a_blob_is_a_and_b_of_each_site():
    values = torch.arange(float(VALUES))
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        blob = values.to(torch_dtype).view(torch.uint8).numpy().tobytes()
        found = read_lora(SITES, SHAPES, dtype, blob)
        assert torch.equal(found["q_proj"].a.float(), values[:8].view(2, 4))
        assert torch.equal(found["q_proj"].b.float(), values[8:20].view(6, 2))
        assert torch.equal(found["v_proj"].a.float(), values[20:24].view(1, 4))
        assert torch.equal(found["v_proj"].b.float(), values[24:].view(2, 1))
        assert [found[site.name].scale for site in SITES] == [0.5, 2.0]
        assert found["q_proj"].a.dtype == torch_dtype
    assert read_lora((), SHAPES, "bf16", b"") == {}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "holds NaN or infinity"),
        (float("-inf"), "holds NaN or infinity"),
        (10_001.0, "holds 10001, 10000 is the largest"),
        (-2e38, "holds 2e"),
    ],
)
def test_a_blob_that_would_spoil_its_rows_is_refused(value, said):
    blob = bytearray(4 * VALUES)
    blob[4 * 17 : 4 * 18] = struct.pack("<f", value)
    with pytest.raises(MessageError, match=said):
        read_lora(SITES, SHAPES, "fp32", blob)


def test_a_blob_of_another_size_is_refused():
    with pytest.raises(MessageError, match=f"a blob of an adapter has 7 bytes, its sites take {2 * VALUES}"):
        read_lora(SITES, SHAPES, "bf16", bytes(7))
    with pytest.raises(MessageError, match="'k_proj'"):
        read_lora((LoraSite("k_proj", 1, 1.0),), SHAPES, "bf16", b"")
