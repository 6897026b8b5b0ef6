"""A model of the first blocks of another one, as the benchmark of links takes it."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.network.first_blocks import write_first_blocks
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.checkpoint.info import read_info
from tests.model_fixtures import saved


def test_a_model_of_the_first_blocks_computes_what_these_blocks_do(tmp_path: Path) -> None:
    whole = saved("llama", tmp_path)
    write_first_blocks(whole.path, 2, tmp_path / "first")
    first = open_folder(tmp_path / "first", memo=HashMemo(tmp_path / "more.json"))
    info = read_info(first)
    assert (info.blocks, info.hidden_size) == (2, read_info(whole).hidden_size)
    assert read_info(whole).blocks > 2
    hidden = torch.randn(1, 3, info.hidden_size, generator=torch.Generator().manual_seed(1))
    spans = [
        load_span(model, 0, 2, dtype=torch.float32, device="cpu", quantize="none") for model in (whole, first)
    ]
    with torch.inference_mode():
        found = [span.forward(hidden, span.new_cache(1, 3), 0, 0, 2) for span in spans]
    assert torch.equal(*found)
