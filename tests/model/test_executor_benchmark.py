"""The benchmark of the executor runs on any machine in tiny sizes, with each step's share of its floor."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compute import executor, shapes
from benchmarks.lib.memory_reader import MemoryReader
from node.model.checkpoint.info import read_info


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of one test is left for another one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def rows_of(tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    file = tmp_path / "rows.json"
    assert executor.main([*words, "--json", str(file)]) == 0
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def test_tiny_shapes_are_timed_next_to_the_floor_that_the_same_run_measured(tmp_path, capsys):
    rows = rows_of(tmp_path, "--small", "--quantize", "none", "int8")
    combinations = {(row["model"], row["quantize"], row["context"], row["sessions"]) for row in rows}
    assert len(combinations) == len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert row["read_gb_per_s"] > 0
        bytes_of_weights = row["weights_mib"] * 2**20
        assert row["floor_ms"] == pytest.approx(bytes_of_weights / row["read_gb_per_s"] / 1e6)
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_step"])
        assert row["floor_with_cache_ms"] > row["floor_ms"]
        assert row["vram_peak_mib"] is None
        assert row["share_of_reference"] is None
    assert "of the floor" in capsys.readouterr().out


def test_what_is_not_given_follows_the_device():
    here = executor.parse([])
    assert (here.sessions, here.contexts, here.quantize) == ([1, 4, 8, 16], None, ["none"])
    assert (here.dtype, here.no_reference) == (["float32"], False)
    there = executor.parse(["--device", "cuda:1", "--shapes", "llama-3-8b", "bloom-176b"])
    assert (there.sessions, there.contexts) == ([1, 4, 16, 64], [100, 1000, 8000])
    assert (there.quantize, there.dtype, there.no_reference) == (["none", "int8"], ["bfloat16"], True)
    small = executor.parse(["--shapes", "bloom-176b", "--small"])
    assert small.shapes == ["small-bloom"]


def test_several_devices_are_timed_as_one_span(tmp_path):
    words = ["--small", "--shapes", "llama-3-8b", "--sessions", "2", "--contexts", "16", "--device", "cpu"]
    (one,) = rows_of(tmp_path, *words)
    (divided,) = rows_of(tmp_path, *words, "--tensor-parallel", "2")
    (split,) = rows_of(tmp_path, *words[:-1], "cpu,cpu")
    assert [row["device"] for row in (one, divided, split)] == ["cpu", "cpu,cpu in parallel", "cpu,cpu"]
    assert one["weights_mib"] == split["weights_mib"] > 1.5 * divided["weights_mib"]
    assert all(row["ms_per_step"] > 0 for row in (divided, split))


def test_what_cannot_be_divided_is_one_line(capsys):
    assert executor.main(["--small", "--shapes", "bloom-176b", "--tensor-parallel", "2"]) == 2
    assert "the blocks of bloom cannot be divided among 2 ranks" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert executor.main(["--device", "cuda:7", "--small"]) == 2
    assert "device cuda:7 is not there" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "values"), [("llama-3-8b", 218_112_000), ("bloom-176b", 2_466_437_120)])
def test_shapes_are_those_of_the_models_that_they_are_named_after(name, values, tmp_path, monkeypatch):
    """Of a block: its numbers; drawn nowhere, only counted."""
    _, config_of = shapes.SHAPES[name]
    config = config_of(1)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    block = next(module for path, module in model.named_modules() if path.endswith(("layers.0", "h.0")))
    assert sum(each.numel() for each in block.parameters()) == values


@pytest.mark.parametrize("name", ["small-llama", "small-bloom"])
def test_a_folder_of_random_weights_is_a_model_and_is_made_once(name, monkeypatch):
    folder = shapes.shape_folder(name)
    assert read_info(folder).blocks == 2
    monkeypatch.setattr(shapes, "save_random", None)  # it would be called otherwise
    assert shapes.shape_folder(name).revision == folder.revision


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_at_a_rate_with_as_many_threads_as_a_step_has(threads, monkeypatch):
    reader = MemoryReader("cpu", 1 << 22, threads)
    assert 1e8 < reader.bytes_per_second() < 1e13
    moments = iter(range(0, 1600, 1))
    monkeypatch.setattr("benchmarks.compute.shapes.time.perf_counter", lambda: next(moments))
    assert reader.bytes_per_second() == 1 << 22, "a reading of all bytes took a second"
