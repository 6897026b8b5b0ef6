"""Other packages over a swarm of two servers in this process; `make test-ecosystem` installs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.hf import from_swarm
from tests.hf_swarm import Nodes, nodes_of
from tests.model_fixtures import save_tiny, save_tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ecosystem") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def nodes(folder: Path) -> Iterator[Nodes]:
    with nodes_of(folder, [(0, 3), (3, 6)]) as nodes:
        yield nodes


@pytest.fixture
def local(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


@pytest.fixture
def remote(nodes: Nodes) -> Any:
    return from_swarm(nodes.swarm)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer
