"""Rotary angles that depend on the length: as the library's `generate` has them, however a prompt is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from node.config import ConfigError
from node.model.blocks.forward_backward import forward
from node.model.blocks.rope import LengthRope, check_rope, stretched
from node.model.blocks.span import Span, load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.checkpoint.info import read_info
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from tests.model_fixtures import _LLAMA, BLOCKS, TINY, VOCAB, save_tiny

torch.set_num_threads(1)

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 9.0],
}
SHORT_TABLE = {"original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
BY_TYPE = {
    "full_attention": LONG | SHORT_TABLE | {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
    "sliding_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3_longrope": ("Phi3ForCausalLM", _LLAMA | SHORT_TABLE | {"rope_parameters": LONG}),
    "llama_longrope": ("LlamaForCausalLM", _LLAMA | {"rope_parameters": LONG | SHORT_TABLE}),
    "llama_dynamic": (
        "LlamaForCausalLM",
        _LLAMA | {"max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    ),
    "gemma3_both": ("Gemma3ForCausalLM", TINY["gemma3_text"][1] | {"rope_parameters": BY_TYPE}),
}


class Case:
    """A model of the library, and ours: two spans and the ends."""

    def __init__(self, name: str, path: Path) -> None:
        TINY[name] = MODELS[name]
        try:
            self.whole = save_tiny(name, path / "model")
        finally:
            del TINY[name]
        self.path = path / "model"
        self.folder: ModelFolder = open_folder(self.path, memo=HashMemo(path / "hashes.json"))
        self.spans: list[Span] = [load_span(self.folder, 0, 2), load_span(self.folder, 2, BLOCKS)]
        self.ends: EmbedAndHead = load_embed_and_head(self.folder)

    def generated(self, ids: Tensor, count: int) -> list[int]:
        """By the library: a fresh model, for it remembers how long a sequence it has seen."""
        fresh = type(self.whole).from_pretrained(self.path)
        found = fresh.generate(
            ids,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return found[0, ids.shape[1] :].tolist()

    def ours(self, ids: Tensor, count: int, chunk: int) -> list[int]:
        """In steps of `chunk` positions, cut as `client.generation.conversation.Conversation` does it."""
        rope = self.ends.rope
        assert rope is not None
        caches, tokens, before = [span.new_cache(1, 128) for span in self.spans], ids[0].tolist(), 0
        for _ in range(count):
            length = rope.length_of(ids.shape[1], len(tokens))
            if not rope.same(length, before):
                for cache in caches:
                    cache.cut(0)
            before = length
            while caches[0].length < len(tokens):
                begin = caches[0].length
                given = torch.tensor([tokens[begin : begin + chunk]])
                hidden = self.ends.embed(given, begin)
                for span, cache in zip(self.spans, caches, strict=True):
                    hidden = span.forward(hidden, cache, begin, rope_length=length)
            tokens.append(int(self.ends.head(hidden[:, -1:])[0, -1].argmax()))
        return tokens[ids.shape[1] :]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def ids_of(count: int) -> Tensor:
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("prompt", "count", "chunk"), [(40, 20, 8), (10, 30, 8), (40, 10, 40), (5, 10, 8), (16, 4, 3), (17, 4, 1)]
)
def test_greedy_tokens_are_the_librarys(case, prompt, count, chunk):
    assert case.ours(ids_of(prompt), count, chunk) == case.generated(ids_of(prompt), count)


def test_rows_of_different_lengths_in_one_batch_have_angles_of_their_own(case):
    # 9 and 30 lie on both sides of the trained length; the third takes those of a prompt of 50.
    lengths, wholes = (9, 30, 30), (0, 0, 50)
    together, alone = [], []
    for answers, batch in ((together, True), (alone, False)):
        arenas = [span.new_arena(400, 128) for span in case.spans]
        sessions = [[pool.open(1, 64) for pool in arenas] for _ in lengths]
        for length, whole, caches in zip(lengths, wholes, sessions, strict=True):
            hidden = case.ends.embed(ids_of(length), 0)
            for span, cache in zip(case.spans, caches, strict=True):
                hidden = span.forward(hidden, cache, 0, rope_length=max(length, whole))
        hidden = case.ends.embed(torch.tensor([[5], [6], [7]]), 0)[:, 0]
        for index, span in enumerate(case.spans):
            caches = [session[index] for session in sessions]
            for cache in caches:
                cache.reserve(cache.length + 1)
            if batch:
                hidden = span.decode(hidden, caches, span.start, span.stop, rope_lengths=wholes)
            else:
                rows = [
                    span.forward(row[None, None], cache, cache.length, rope_length=whole)[:, 0]
                    for row, cache, whole in zip(hidden, caches, wholes, strict=True)
                ]
                hidden = torch.cat(rows)
        answers.append(hidden)
    assert (together[0] - alone[0]).abs().max() <= 1e-5 * alone[0].abs().max()


def test_positions_of_one_step_may_have_lengths_of_their_own(case):
    # As in the replay of generated tokens: one step, and each position as long as the sequence up to it.
    ids = ids_of(30)
    answers = []
    for sizes in ((10, 20), (10, *[1] * 20)):
        caches, parts, position = [span.new_cache(1, 64) for span in case.spans], [], 0
        for size in sizes:
            hidden = case.ends.embed(ids[:, position : position + size], position)
            for span, cache in zip(case.spans, caches, strict=True):
                hidden = span.forward(hidden, cache, position, rope_length=10)
            parts.append(hidden)
            position += size
        answers.append(torch.cat(parts, 1))
    assert (answers[0] - answers[1]).abs().max() <= 1e-5 * answers[1].abs().max()


def test_requests_without_a_session_do_not_see_each_others_lengths(case):
    def logits(count: int) -> Tensor:
        hidden = case.ends.embed(ids_of(count), 0)
        for span in case.spans:
            hidden = forward(span, hidden, span.start, span.stop)
        return case.ends.head(hidden)

    for count in (40, 20, 10, 30):
        fresh = type(case.whole).from_pretrained(case.path)
        with torch.inference_mode():
            expected = fresh(ids_of(count), use_cache=False).logits
        assert (logits(count) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_points_at_which_angles_change():
    long, dynamic = LengthRope((("longrope", 16),)), LengthRope((("dynamic", 16),))
    assert [long.same(16, other) for other in (1, 15, 17)] == [True, True, False]
    assert long.same(17, 1000)
    assert [dynamic.same(16, other) for other in (1, 17)] == [True, False]
    assert not dynamic.same(17, 18)
    assert long.length_of(5, 20) == 5
    assert LengthRope(long.rules, recomputed=True).length_of(5, 20) == 20


def test_dynamic_reaches_as_far_as_its_factor_says(tmp_path):
    case = Case("llama_dynamic", tmp_path)
    assert read_info(case.folder).max_position == case.spans[0].max_length == 128
    assert stretched({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16) == 16
    assert stretched({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, 16) == 16
    assert stretched({"model_type": "gptj", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 16) == 16


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_scaling": {"type": "su"}},
        "rope_scaling has the type 'su' .*; known are default, linear, dynamic",
    ),
    ({"rope_parameters": {"rope_type": "lnear"}}, "rope_parameters has the type 'lnear'"),
    ({"rope_scaling": {"rope_type": None, "factor": 2}}, "has the type None"),
    ({"rope_scaling": {"type": ["linear"]}}, r"has the type \['linear'\]"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', an object"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\], an object"),
    ({"rope_scaling": {"type": "linear"}}, "of type linear has no factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor of rope_scaling is '2', a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor of rope_scaling is 0, a number above 0"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "of type llama3 has no low_freq_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "longrope has no long_factor"),
    ({"rope_scaling": LONG | {"long_factor": 4.0}}, "long_factor of rope_scaling is 4.0, a list of numbers"),
    ({"rope_scaling": LONG | {"long_factor": [1.0, "2"]}}, "a list of numbers above 0 is expected"),
    ({"rope_scaling": LONG | {"long_factor": [1.0]}}, "has 1 values as long_factor, the model has 4 pairs"),
    ({"rope_parameters": {"full_attention": {"rope_type": "what"}}}, "has the type 'what'"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_cannot_be_followed_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        check_rope(LLAMA | settings, Path("m/config.json"))
    assert str(refused.value).startswith("m/config.json: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": LONG},
        {"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}},
        {"rope_scaling": LONG | {"short_factor": [1.0] * 2, "long_factor": [1.0] * 2}, "head_dim": 4},
        {"model_type": "phi3", "rope_scaling": LONG | {"rope_type": "yarn"}},
        {"model_type": "gptj", "rope_scaling": {"type": "whatever"}},
        {"rope_parameters": BY_TYPE, "head_dim": 16},
    ],
)
def test_settings_that_the_library_follows_are_taken(settings):
    check_rope(LLAMA | settings, Path("config.json"))


@pytest.mark.parametrize("what", [read_info, load_embed_and_head, lambda folder: load_span(folder, 0, 1)])
def test_a_folder_with_such_settings_is_refused_before_its_weights_are_read(what, tmp_path):
    save_tiny("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}))
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ConfigError, match=r"config\.json: rope_parameters has the type 'su'"):
        what(folder)
