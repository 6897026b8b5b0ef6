"""`python -m benchmarks mutants`: which changes are tried, and what the score counts."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from benchmarks.mutants import mutants

CHANGED = """
def x_half__mutmut_orig(value):
    return value / 2
def x_half__mutmut_1(value): # type: ignore # mutmut generated
    return value * 2
def x_half__mutmut_2(value): # type: ignore # mutmut generated
    return value / 3
"""
NAMES = ["routing.names.x_half__mutmut_1", "routing.names.x_half__mutmut_2"]


def work(tmp_path: Path, monkeypatch, codes: list[int | None]) -> Path:
    """A copy after mutmut's first run, with one changed module."""
    monkeypatch.setattr(mutants, "WORK", tmp_path)
    folder = tmp_path / "mutants" / "routing"
    folder.mkdir(parents=True)
    (folder / "names.py").write_text(CHANGED)
    record = folder / "names.py.meta"
    record.write_text(json.dumps({"exit_code_by_key": dict(zip(NAMES, codes, strict=True))}))
    return record


def codes_in(record: Path) -> list[int | None]:
    return list(json.loads(record.read_text())["exit_code_by_key"].values())


def config(*equivalent: mutants.Equivalent) -> mutants.Config:
    return mutants.Config(0, 0.0, 1, "", (), (), (), (), (), equivalent)


def test_every_pattern_of_modules_and_tests_finds_files():
    found = mutants.read_config()
    modules = [str(path.relative_to(mutants.ROOT)) for path in mutants.ROOT.glob("*/**/*.py")]
    for pattern in (*found.modules, *found.left_out):
        assert fnmatch.filter(modules, pattern), pattern
    for pattern in found.tests:
        assert list(mutants.ROOT.glob(pattern)), pattern
    for item in found.equivalent:
        assert (mutants.ROOT / item.module).exists(), item.module
        assert item.before in (mutants.ROOT / item.module).read_text(), item
        assert len(item.reason) > 20, item


def test_a_change_that_is_listed_as_equivalent_is_not_tried(tmp_path, monkeypatch):
    record = work(tmp_path, monkeypatch, [None, None])
    listed = mutants.Equivalent("routing/names.py", "return value / 2", "return value / 3", "a reason")
    mutants.choose(config(listed), sample=0)
    assert codes_in(record) == [None, mutants.SKIP]


def test_a_sample_leaves_out_the_rest_and_is_drawn_alike_each_time(tmp_path, monkeypatch):
    record = work(tmp_path, monkeypatch, [None, None])
    mutants.choose(config(), sample=1)
    drawn = codes_in(record)
    assert sorted(drawn, key=str) == [mutants.SKIP, None]
    mutants.choose(config(), sample=1)
    assert codes_in(record) == drawn


def test_the_score_is_the_share_of_tried_changes_that_a_test_noticed(tmp_path, monkeypatch):
    work(tmp_path, monkeypatch, [1, 0])
    found = mutants.outcome(config())
    assert found["score"] == found["modules"]["routing/names.py"]["score"] == 0.5
    assert found["outcomes"] == {"killed": 1, "survived": 1}
    assert mutants.score({"killed": 1, "timeout": 1, "no_tests": 2, "skipped": 5, "not_tried": 7}) == 0.5
    assert mutants.score({"skipped": 5}) is None


def test_a_change_that_no_test_noticed_is_shown_by_its_lines(tmp_path, monkeypatch):
    work(tmp_path, monkeypatch, [1, 0])
    assert list(mutants.survivors()) == [(NAMES[1], ["-return value / 2", "+return value / 3"])]
