"""Every supported architecture, as tiny random models, against the library's whole model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from node.config import ConfigError
from node.model.blocks.kv_pages import CannotCut
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.architecture import ARCHITECTURES, architecture_of
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.checkpoint.info import memory_needed, read_info
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from tensor_codec.errors import LocalProtocolError
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny

torch.set_num_threads(1)

# Relative to the largest logit.  Other chunks are other matrix products; 1.1e-6 was the worst seen.
TOLERANCE = 5e-6
SPANS = ((0, 1), (1, 4), (4, BLOCKS))
CHUNKS = (7, 1, 5, 1, 1, 9)
TOKENS = sum(CHUNKS)


@dataclass(frozen=True)
class Case:
    whole: Any  # the library's model
    folder: ModelFolder
    spans: tuple[Span, ...]
    ends: EmbedAndHead


@pytest.fixture(scope="module", params=sorted(TINY))
def case(request, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp(request.param)
    whole = save_tiny(request.param, path / "model")
    folder = open_folder(path / "model", memo=HashMemo(path / "hashes.json"))
    spans = tuple(load_span(folder, start, stop) for start, stop in SPANS)
    return Case(whole, folder, spans, load_embed_and_head(folder))


def ids_of(seed: int, tokens: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def whole_logits(case: Case, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return case.whole(ids, use_cache=False).logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_three_spans_fed_in_ragged_chunks_give_the_whole_models_logits(case):
    ids = ids_of(0)
    caches = [span.new_cache(2, TOKENS) for span in case.spans]
    logits, position = [], 0
    for tokens in CHUNKS:
        hidden = case.ends.embed(ids[:, position : position + tokens], position)
        for span, cache in zip(case.spans, caches, strict=True):
            hidden = span.forward(hidden, cache, position)
        logits.append(case.ends.head(hidden))
        position += tokens
    assert_close(torch.cat(logits, 1), whole_logits(case, ids))
    assert {cache.length for cache in caches} == {TOKENS}


def test_a_session_may_use_any_run_of_a_spans_blocks(case):
    ids = ids_of(1)
    first, middle, last = case.spans
    runs = ((first, 0, 1), (middle, 1, 2), (middle, 2, 4), (last, 4, 6))
    caches = [span.new_cache(2, TOKENS) for span, _, _ in runs]
    logits = []
    for position in (0, 10):
        hidden = case.ends.embed(ids[:, position : position + 10], position)
        for (span, start, stop), cache in zip(runs, caches, strict=True):
            hidden = span.forward(hidden, cache, position, start, stop)
        logits.append(case.ends.head(hidden))
    assert_close(torch.cat(logits, 1), whole_logits(case, ids[:, :20]))


def test_a_cut_cache_goes_on_as_if_the_rest_had_never_been(case):
    ids, wrong = ids_of(2), ids_of(3)
    caches = [span.new_cache(2, 64) for span in case.spans]

    def step(tokens: Tensor, position: int) -> Tensor:
        hidden = case.ends.embed(tokens, position)
        for span, cache in zip(case.spans, caches, strict=True):
            hidden = span.forward(hidden, cache, position)
        return case.ends.head(hidden)

    step(ids[:, :12], 0)
    step(wrong[:, :11], 12)
    if not all(span.can_cut for span in case.spans):
        caches[0].cut(23)  # cutting nothing off is always possible
        with pytest.raises(CannotCut, match="from 23 to 12"):
            caches[0].cut(12)
        for cache in caches:
            cache.cut(0)  # and so is beginning again
        step(ids[:, :12], 0)
    else:
        for cache in caches:
            cache.cut(12)
    assert_close(step(ids[:, 12:], 12), whole_logits(case, ids)[:, 12:])


def test_rows_of_different_lengths_in_one_batch_get_what_each_gets_alone(case):
    lengths, more = (9, 1, 17, 4), 3
    ids = [ids_of(10 + length, length + more, 1 + length % 2) for length in lengths]
    arenas = [span.new_arena(400) for span in case.spans]
    sessions = [[pool.open(len(row), 64) for pool in arenas] for row in ids]
    for row, caches, length in zip(ids, sessions, lengths, strict=True):
        hidden = case.ends.embed(row[:, :length], 0)
        for span, cache in zip(case.spans, caches, strict=True):
            hidden = span.forward(hidden, cache, 0)
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
            hidden = span.decode(hidden, caches, span.start, span.stop)
            for cache in caches:
                cache.length += 1
        logits = case.ends.head(hidden[:, None])
        for row, length, got in zip(ids, lengths, logits.split([len(row) for row in ids]), strict=True):
            assert_close(got, whole_logits(case, row[:, : length + step + 1])[:, -1:])


def test_rows_that_change_their_order_go_on_as_the_rows_that_they_were(case):
    """A permutation, repeated rows, then all rows from one, beyond the first page and into the next."""
    ids = ids_of(6, 14, batch=4)
    caches = [span.new_cache(4, 32) for span in case.spans]

    def run(new: Tensor) -> Tensor:
        hidden = case.ends.embed(new, caches[0].length)
        for span, cache in zip(case.spans, caches, strict=True):
            if new.shape[1] > 1:
                hidden = span.forward(hidden, cache, cache.length)
                continue
            cache.reserve(cache.length + 1)
            hidden = span.decode(hidden[:, 0], [cache], span.start, span.stop)[:, None]
            cache.length += 1
        return case.ends.head(hidden)

    run(ids)
    steps = (((2, 0, 3, 1), 1), ((0, 0, 2, 2), 4), ((3, 1, 3, 1), 1), ((1, 1, 1, 1), 1), ((0, 3, 2, 1), 2))
    for seed, (order, tokens) in enumerate(steps):
        for cache in caches:
            cache.select(order)
        new = ids_of(seed, tokens, batch=4)
        ids = torch.cat([ids[list(order)], new], 1)
        assert_close(run(new), whole_logits(case, ids)[:, -tokens:])


def test_calling_the_plain_ends_by_themselves_changes_no_bit(case):
    ends, ids = case.ends, ids_of(4)
    hidden = torch.randn(2, 3, ends.hidden_size)
    embedded, logits = ends.embed(ids, 5), ends.head(hidden)
    general = EmbedAndHead(ends.library_model, replace(ends.architecture, plain_ends=False), ends.folder)
    assert torch.equal(embedded, general.embed(ids, 5))
    assert torch.equal(logits, general.head(hidden))
    assert logits.dtype == torch.float32


def test_info_agrees_with_what_is_loaded_and_cached(case):
    info = read_info(case.folder)
    assert (info.blocks, info.vocab_size) == (BLOCKS, VOCAB)
    assert info.hidden_size == case.ends.hidden_size
    loaded = sum(tensor.nbytes for span in case.spans for tensor in span.model.state_dict().values())
    assert 4 * sum(info.block_values) == loaded
    assert info.block_bytes("bfloat16") == 2 * max(info.block_values)
    cached = [shape.values for shape in case.spans[2].shapes if shape is not None]
    assert max(cached, default=0) * 4 == info.kv_bytes_per_token_per_block("float32")
    assert memory_needed(info, 2, "float32", 10) == 2 * (
        info.block_bytes() + 10 * info.kv_bytes_per_token_per_block()
    )


def test_every_architecture_of_the_table_has_a_tiny_model(tmp_path):
    families = {name for name in ARCHITECTURES if name in TINY}
    assert families == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next", None, 7])
def test_an_untested_architecture_is_refused_with_the_list_of_those_supported(model_type):
    with pytest.raises(ConfigError, match=r"is not supported; supported are bloom, cohere2, .*starcoder2"):
        architecture_of(model_type)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny("llama", path / "model")
    return path


def opened(llama: Path) -> ModelFolder:
    return open_folder(llama / "model", memo=HashMemo(llama / "hashes.json"))


@pytest.mark.parametrize(("start", "stop"), [(2, 9), (-1, 2), (3, 3), (6, 7)])
def test_blocks_outside_the_model_are_refused_with_both_ranges(llama, start, stop):
    with pytest.raises(ConfigError, match=f"blocks {start}:{stop} are not within 0:6"):
        load_span(opened(llama), start, stop)


def test_a_step_that_does_not_continue_the_cache_is_our_bug(llama):
    span = load_span(opened(llama), 0, 2)
    cache = span.new_cache(1, 8)
    hidden = torch.zeros(1, 3, 32)
    span.forward(hidden, cache, 0)
    for position, start, stop in ((0, 0, 2), (4, 0, 2), (3, 0, 3), (3, 1, 1)):
        with pytest.raises(LocalProtocolError):
            span.forward(hidden, cache, position, start, stop)
    span.forward(hidden, cache, 3)
    with pytest.raises(LocalProtocolError, match="3 tokens at 6 do not continue a cache of 6/8"):
        span.forward(hidden, cache, 6)


def test_a_step_that_fails_leaves_the_cache_where_it_was(llama, monkeypatch):
    span = load_span(opened(llama), 0, 3)
    cache, other = span.new_cache(1, 64), span.new_cache(1, 64)
    hidden = torch.randn(1, 5, 32)
    span.forward(hidden, cache, 0)
    span.forward(hidden, other, 0)
    with monkeypatch.context() as patch:
        patch.setattr(span._fused, "_compiled_for", lambda rows: False)
        patch.setattr(span._fused.blocks[2].down, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            span.forward(torch.randn(1, 2, 32), cache, 5)
    assert cache.length == 5
    step = torch.randn(1, 4, 32)
    assert torch.equal(span.forward(step, cache, 5), span.forward(step, other, 5))


def test_a_span_in_bfloat16_computes_in_bfloat16(llama, monkeypatch):
    monkeypatch.setattr("node.model.blocks.span.has_bfloat16", lambda: True)  # else only the weights are
    folder = opened(llama)
    span = load_span(folder, 0, 6, dtype=torch.bfloat16)
    ends = load_embed_and_head(folder, dtype=torch.bfloat16)
    hidden = ends.embed(ids_of(5), 0)
    exact = load_span(folder, 0, 6)
    got = span.forward(hidden, span.new_cache(2, 64), 0)
    assert got.dtype == torch.bfloat16
    assert ends.head(got).dtype == torch.float32
    expected = exact.forward(hidden, exact.new_cache(2, 64), 0)
    assert torch.allclose(got.float(), expected, atol=0.05, rtol=0.05)
    assert span.nbytes < exact.nbytes


def test_only_the_files_of_the_span_are_needed(llama):
    wanted: list[set[str]] = []
    folder = opened(llama)

    class Recorder(ModelFolder):
        def need(self, files, progress=None):
            wanted.append(set(files))

    recorded = Recorder(folder.path, folder.name, folder.revision, folder.config, folder.tensors)
    load_span(recorded, 2, 4)
    load_embed_and_head(recorded)
    blocks = {
        entry.file for name, entry in folder.tensors.items() if ".layers.2." in name or ".layers.3." in name
    }
    assert wanted[0] == blocks
    assert wanted[0] < {entry.file for entry in folder.tensors.values()}
    assert wanted[1] == {e.file for n, e in folder.tensors.items() if ".layers." not in n}


def test_weights_of_the_files_dtype_are_not_copied(llama):
    span = load_span(opened(llama), 1, 2)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [m for m in maps if len(m) > 5 and m[5].endswith(".safetensors")]
    ranges = [tuple(int(edge, 16) for edge in m[0].split("-")) for m in mapped]
    for name, parameter in span.model.named_parameters():
        inside = any(low <= parameter.data_ptr() < high for low, high in ranges)
        assert inside != ("_proj" in name)  # fused blocks lay the matrices one after the other


def test_a_checkpoint_of_the_base_model_alone_is_read_without_its_prefix(tmp_path):
    from safetensors.torch import load_file, save_file

    whole = save_tiny("gpt2", tmp_path / "model", max_shard_size="1GB")
    file = tmp_path / "model" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    span, ends = load_span(folder, 0, BLOCKS), load_embed_and_head(folder)
    ids = ids_of(6)
    got = ends.head(span.forward(ends.embed(ids, 0), span.new_cache(2, 64), 0))
    assert_close(got, whole(ids).logits)


def _rewrite(path: Path, change) -> ModelFolder:
    from safetensors.torch import load_file, save_file

    save_tiny("llama", path / "model", max_shard_size="1GB")
    file = path / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    folder = _rewrite(tmp_path, lambda t: t.pop("model.layers.2.self_attn.k_proj.weight"))
    with pytest.raises(
        ConfigError, match=r"tensor layers.1.self_attn.k_proj.weight of blocks 1:4 is missing"
    ):
        load_span(folder, 1, 4)
    load_span(folder, 3, 6)  # the others are well


def test_a_missing_block_is_refused_by_number(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if ".layers.4." in name]:
            del tensors[name]

    folder = _rewrite(tmp_path, drop)
    with pytest.raises(ConfigError, match="has no tensor of block 4"):
        load_span(folder, 3, 6)
    with pytest.raises(ConfigError, match="has no tensor of block 4"):
        read_info(folder)


def test_a_tensor_of_the_wrong_shape_is_refused_with_both_shapes(tmp_path):
    def shrink(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)

    folder = _rewrite(tmp_path, shrink)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.up_proj.weight .* 40x32, the config asks for 48x32"):
        load_span(folder, 0, 3)


def test_a_tensor_without_a_place_in_the_model_is_refused_by_name(tmp_path):
    def add(tensors):
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)

    folder = _rewrite(tmp_path, add)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.extra.weight .* has no place in the model"):
        load_span(folder, 0, 3)


def test_a_missing_embedding_is_refused_by_name(tmp_path):
    folder = _rewrite(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"tensor model.norm.weight of the ends is missing"):
        load_embed_and_head(folder)


def test_a_config_that_the_library_refuses_is_named(tmp_path):
    folder = _rewrite(tmp_path, lambda t: None)
    config = json.loads((folder.path / "config.json").read_text()) | {"hidden_size": "wide"}
    (folder.path / "config.json").write_text(json.dumps(config))
    folder = open_folder(folder.path, memo=HashMemo(tmp_path / "hashes.json"))
    with pytest.raises(ConfigError, match=r"config.json"):
        load_span(folder, 0, 3)


def test_tokens_that_end_a_generation_come_from_the_generation_config_first(llama):
    folder = opened(llama)
    ends = load_embed_and_head(folder)
    assert ends.eos_ids == {2}
    (folder.path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_embed_and_head(folder).eos_ids == {2, 7}
