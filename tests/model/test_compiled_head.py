"""A head that our own kernel computes is the library's, and no row knows of the others."""

from __future__ import annotations

import pytest
import torch

from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import load_embed_and_head
from node.model.weights.quantize import kernels
from tests.model_fixtures import save_tiny


@pytest.mark.skipif(kernels() is None, reason="numba cannot be imported here")
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_compiled_head_gives_the_librarys_logits_and_a_row_the_same_bits_in_any_company(variant, tmp_path):
    save_tiny(variant, tmp_path / "model", max_shard_size="10MB")
    ends = load_embed_and_head(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
    rows = torch.randn(9, 1, ends.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    expected = ends.head(rows)
    ends.compile_head()  # changes nothing for gpt2, whose head is the library's whole forward
    found = ends.head(rows)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (ends._product is None) is (variant == "gpt2")
    if ends._product is not None:
        assert torch.equal(found, torch.cat([ends.head(row[None]) for row in rows]))
