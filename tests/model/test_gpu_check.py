"""The check for machines with a GPU: it fits into eight minutes, and runs in tiny sizes without one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path))


def test_all_sections_take_less_than_eight_minutes(script):
    assert sum(script.SECTIONS.values()) < 480
    assert list(script.RUN) == list(script.SECTIONS)


def test_a_section_that_is_not_there_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["sped"])
    assert "no section sped" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["env", "correct", "families", "linear", "attention", "memory"])
def test_a_section_runs_without_a_gpu_and_keeps_what_it_found(section, script, tmp_path):
    assert script.main([section, "--inside", "--device", "cpu", "--small"]) == 0
    found = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {line["section"] for line in found} == {section}
    assert not [line for line in found if "FAILED" in line["what"]]


def test_what_fails_is_a_line_and_the_exit_code_and_the_rest_of_the_section_runs(
    script, tmp_path, monkeypatch
):
    def section(check: Any) -> None:
        with check.tried("one thing"):
            raise RuntimeError("no such kernel\nsecond line")
        check.expect("another thing", False, found=3)
        check.expect("a third thing", True, found=4)

    monkeypatch.setitem(script.RUN, "env", section)
    assert script.main(["env", "--inside", "--device", "cpu"]) == 1
    found = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["what"] for line in found] == ["one thing FAILED", "another thing FAILED", "a third thing"]
    assert found[0]["error"] == "RuntimeError: no such kernel"


def test_a_section_that_hangs_is_ended_with_all_that_it_started(script, tmp_path, monkeypatch):
    flags = SimpleNamespace(device="cpu", small=True)
    hanging = tmp_path / "hanging.py"
    pid = tmp_path / "pid"
    hanging.write_text(
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.setattr(script, "__file__", str(hanging))
    monkeypatch.setattr(script, "SECTIONS", {"env": 3})
    monkeypatch.setattr(script, "CPU_TIMES", 1)
    assert not script.passes("env", flags, tmp_path / "out.jsonl")
    assert "not done within 3 s" in (tmp_path / "out.jsonl").read_text()
    child = int(pid.read_text())
    for _ in range(100):  # the process that waited for it is gone: init takes it
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True, check=False
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the process of a section outlived it")
