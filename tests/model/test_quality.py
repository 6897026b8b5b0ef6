"""The benchmark of quality: its measures, and that it runs on any model."""

import json
import math

import pytest
import torch

from benchmarks.compute import quality
from tests.model_fixtures import save_tiny, save_tiny_tokenizer


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    assert quality.perplexity(torch.zeros(1, 20, 50), ids) == pytest.approx(50)
    certain = torch.nn.functional.one_hot(ids.roll(-1, 1), 50) * 1000.0
    assert quality.perplexity(certain, ids) == pytest.approx(1)


def test_the_distance_is_zero_for_the_same_and_the_divergence_for_others():
    exact = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(1))
    assert quality.distance(exact, exact + 3) == (pytest.approx(0, abs=1e-6), 1.0)
    even, odds = torch.zeros(1, 1, 2), torch.tensor([[[math.log(3), 0.0]]])
    kl, same = quality.distance(odds, even)
    assert kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert same == 1.0


def test_the_text_is_long_enough():
    assert len(quality.TEXT.read_text().split()) > 512


def test_it_compares_each_way_with_float32(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    file = tmp_path / "rows.json"
    words = ["--model", str(tmp_path / "model"), "--quantize", "int8", "--tokens", "40", "--json", str(file)]
    assert quality.main(words) == 0
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["float32", "bfloat16", "int8"]
    assert rows[0]["kl"] < 1e-6
    assert 1e-9 < rows[2]["kl"] < 1e-3
    assert rows[2]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.01)
    assert rows[2]["weights_mib"] < 0.5 * rows[0]["weights_mib"]
    assert "int8" in capsys.readouterr().out


def test_it_compares_each_codec_at_each_number_of_boundaries(tmp_path, monkeypatch):
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path / "cache"))
    save_tiny("llama", tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    file = tmp_path / "rows.json"
    words = [
        "--model",
        str(tmp_path / "model"),
        "--boundaries",
        "1",
        "2",
        "--tokens",
        "40",
        "--json",
        str(file),
    ]
    assert quality.main(words) == 0
    found = {(row["codec"], row["boundaries"]): row["kl"] for row in json.loads(file.read_text())}
    assert found.keys() == {(codec, count) for codec in ("fp32", "bf16", "int8o") for count in (1, 2)}
    assert max(found["fp32", 1], found["fp32", 2]) < 1e-6
    assert found["int8o", 1] > 0
