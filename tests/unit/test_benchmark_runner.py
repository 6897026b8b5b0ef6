"""`python -m benchmarks NAME` runs each benchmark; a file of results says where its figures come from."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import BENCHMARKS, main, overview
from benchmarks.figures import measurements
from benchmarks.figures.figures import parse
from benchmarks.figures.measurements import DEMO, MEASUREMENTS, USUAL, measure
from benchmarks.lib import results
from benchmarks.lib.results import Run, command

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_is_listed_and_writes_json(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    usage = capsys.readouterr().out
    assert f"python -m benchmarks {name}" in usage
    assert name == "figures" or "--json" in usage
    module = importlib.import_module(BENCHMARKS[name])
    assert list(inspect.signature(module.main).parameters) == ["arguments"]
    assert (module.__doc__ or "").partition("\n")[0] in overview()


def test_every_module_that_parses_a_command_line_is_in_the_list_or_is_a_worker():
    for path in FOLDER.rglob("*.py"):
        module = ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
        text = path.read_text()
        if "ArgumentParser(" in text and module not in BENCHMARKS.values():
            assert '__name__ == "__main__"' in text, module
            assert "A worker of " in text, module


def test_an_unknown_name_is_an_error(capsys: pytest.CaptureFixture[str]):
    assert main(["decoding"]) == 2
    assert "no benchmark 'decoding'" in capsys.readouterr().err


def test_no_name_lists_the_names(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks NAME")


def test_no_folder_of_benchmarks_has_more_than_a_dozen_modules():
    for folder in (FOLDER, *(path for path in FOLDER.iterdir() if path.is_dir())):
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12, folder


def test_a_result_says_what_was_run_at_which_commit_and_where(tmp_path: Path):
    Run().write(tmp_path / "one.json", {"steps_per_s": 2.0})
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["steps_per_s"] == 2.0
    assert {"command", "commit", "machine"} <= one.keys()
    assert {"cpu", "cores", "python", "torch", "raceme", "day", "others"} <= one["machine"].keys()


def test_each_of_several_results_says_it(tmp_path: Path):
    Run().write(tmp_path / "rows.json", [{"row": 1}, {"row": 2}])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["row"] for row in rows] == [1, 2]
    assert all({"command", "commit", "machine"} <= row.keys() for row in rows)


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Run().write(None, {"steps_per_s": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_a_result_can_be_repeated():
    words = ["decode", "--json", "a file.json", "--servers", "3", "--model", "a name", "--inside"]
    assert command(words) == "python -m benchmarks decode --servers 3 --model 'a name'"


def test_an_archive_without_a_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() == "unknown"


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("name", sorted(MEASUREMENTS.keys() - {DEMO}))
def test_the_command_of_every_result_is_understood(name: str, monkeypatch: pytest.MonkeyPatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *words: object, **options: object) -> None:
        parse_args(self, *words, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        main([*MEASUREMENTS[name], "--json", "result.json"])


def test_a_result_is_measured_by_its_command_into_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        ran.append(words[2:])
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(measurements, "FIGURES", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    assert measure("decode-3", rounds=2) == 3
    assert measure("wan", rounds=2) == 3
    assert ran == [
        [
            "benchmarks",
            "decode",
            "--servers",
            "3",
            "--rounds",
            "2",
            "--json",
            str(tmp_path / "decode-3.json"),
        ],
        ["benchmarks", "wan", "--json", str(tmp_path / "wan.json")],
    ]


def test_the_usual_results_are_measured_where_none_is_named(capsys: pytest.CaptureFixture[str]):
    assert parse([]).measure is None
    assert parse(["--measure"]).measure == list(USUAL)
    assert parse(["--measure", "wan", "executor"]).measure == ["wan", "executor"]
    with pytest.raises(SystemExit):
        parse(["--measure", "one-that-is-not-there"])
    assert "one-that-is-not-there" in capsys.readouterr().err
