"""Angles that depend on the length, in a swarm: `generate` of the library's loop and of the client's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from client.hf import from_swarm
from tests.hf_swarm import nodes_of
from tests.model.test_rope import MODELS
from tests.model_fixtures import BLOCKS, TINY, VOCAB, save_tiny, save_tiny_tokenizer

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
Fresh = Callable[[], Any]


@pytest.fixture(scope="module", params=MODELS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Fresh]]:
    """A model in a swarm, and fresh ones of the library: each remembers the longest sequence it has seen."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, request.param, MODELS[request.param])
        whole = save_tiny(request.param, path)
    save_tiny_tokenizer(path)
    with nodes_of(path, [(0, 2), (2, BLOCKS)]) as nodes:
        yield from_swarm(nodes.swarm), lambda: type(whole).from_pretrained(path)


def never(ids: Tensor, scores: Any, **_: Any) -> Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("loop", ["own", "library"])
@pytest.mark.parametrize(("prompt", "count"), [(40, 12), (10, 24), (16, 4)])
def test_a_row_gets_the_library_s_tokens(
    models: tuple[Any, Fresh], loop: str, prompt: int, count: int
) -> None:
    remote, fresh = models
    ids = torch.randint(3, VOCAB, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    given = {"max_new_tokens": count, "min_new_tokens": count, **OPTIONS}
    criteria = {} if loop == "own" else {"stopping_criteria": [never]}
    assert torch.equal(remote.generate(ids, **given, **criteria), fresh().generate(ids, **given))


@pytest.mark.parametrize(("tokens", "pad"), [(40, 30), (18, 6), (9, 4)])
def test_a_padded_batch_gets_the_library_s_tokens(models: tuple[Any, Fresh], tokens: int, pad: int) -> None:
    remote, fresh = models
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, **OPTIONS}
    assert torch.equal(remote.generate(ids * mask, **given), fresh().generate(ids * mask, **given))
