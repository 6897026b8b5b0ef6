"""A model at the client guesses its own greedy tokens, and computes no token of the text twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from client.speculation import draft_model
from client.speculation.draft_model import DraftModel, check_model, load_model
from client.speculation.speculators import Speculators
from tests.fakes_serving import FakeCompute
from tests.model_fixtures import VOCAB, save_tiny, save_tiny_tokenizer

PROMPT = [83, 33, 80, 48, 61, 57, 82]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "small"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return list(model.generate(ids, max_new_tokens=count, **options)[0, len(tokens) :].tolist())


async def test_guesses_are_the_model_s_greedy_tokens_whatever_was_guessed_before(model, monkeypatch):
    monkeypatch.setattr(draft_model, "PIECE", 5)  # the prompt goes in pieces
    rng, tokens, drafter = random.Random(0), list(PROMPT), DraftModel(model, FakeCompute())
    assert drafter.seconds == 0
    for _ in range(8):
        most = rng.randrange(1, 6)
        found = await drafter.propose(tokens, most)
        assert found == greedy(model, tokens, most)
        tokens += found[: rng.randrange(most + 1)] + [rng.randrange(3, VOCAB)] * rng.randrange(1, 3)
    assert drafter.seconds > 0


async def test_no_token_of_the_text_is_computed_twice(model):
    taken: list[int] = []

    class Counting:
        device, config = model.device, model.config

        def __call__(self, *, input_ids: torch.Tensor, **given: Any) -> Any:
            taken.extend(input_ids[0].tolist())
            return model(input_ids=input_ids, **given)

    drafter = DraftModel(Counting(), FakeCompute())
    found = await drafter.propose(PROMPT, 4)
    assert taken == [*PROMPT, *found[:3]]
    taken.clear()
    tokens = [*PROMPT, *found[:2], 9, 9]  # two of four were right
    await drafter.propose(tokens, 1)
    assert taken == [9, 9]


def test_another_vocabulary_or_no_model_at_all_is_a_clear_error(model, folder, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=rf"small has a vocabulary of {VOCAB} tokens, big one of 50000"):
        check_model(model, 50_000, "big")
    with pytest.raises(ValueError, match=r"speculate is .* a causal language model of transformers"):
        check_model(print, VOCAB, "big")

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    with pytest.raises(ValueError, match=r"small has a vocabulary of \d+ tokens, big one of 2"):
        load_model(folder, Other(), VOCAB, "big")
    with pytest.raises(ValueError, match="cannot be opened"):
        load_model(tmp_path, tokenizer, VOCAB, "big")


async def test_a_model_that_is_named_is_read_once_for_all_generations(folder, tokenizer):
    asked: list[str] = []

    def find(named: str) -> Path:
        asked.append(named)
        return folder

    makes = Speculators(lambda: tokenizer, VOCAB, "big", FakeCompute(), find)
    for _ in range(2):
        made = makes.speculation("org/small")
        assert made is not None
        await made.begin(PROMPT, frozenset())
        assert made.drafter is not None
        assert len(await made.drafter.propose(PROMPT, 3)) == 3
        made.end()
    assert asked == ["org/small"]


def test_words_say_how_guesses_are_made(model, tokenizer):
    makes = Speculators(lambda: tokenizer, VOCAB, "big", FakeCompute(), Path)
    assert makes.speculation(None) is None
    assert makes.speculation("off") is None
    found = [makes.speculation(how) for how in ("auto", "lookup", model)]
    assert [(each.is_asked, each.policy.guarded, each.drafter is None) for each in found if each] == [
        (False, True, True),
        (True, False, True),
        (True, False, False),
    ]
    with pytest.raises(ValueError, match="both need one tokenizer"):
        Speculators(lambda: tokenizer, 7, "big", FakeCompute(), Path).speculation(model)
