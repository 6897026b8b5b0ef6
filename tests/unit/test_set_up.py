"""scripts/set_up.py: what is done again, what is not, and what the reader is told."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
REST = ["build.lock", "all.lock", "."]  # what follows torch
ALL_LOCK = """\
# Written by scripts/lock.py.
distlib==1 \\
    --hash=sha256:aa
fastecdsa==2.3.2 ; sys_platform != 'win32' \\
    --hash=sha256:bb \\
    --hash=sha256:cc
virtualenv==2 \\
    --hash=sha256:dd
"""


class SetUp:
    """The script in a folder of its own, with every command recorded instead of run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
        assert spec is not None
        assert spec.loader is not None
        self.script: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.ran: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.pip_configuration = ""  # what `pip config list` prints
        self.kept_wheels = ""  # what `pip cache list fastecdsa` prints
        self.on_run: Callable[[list[str]], None] = lambda command: None
        self.venv = folder / ".venv"
        monkeypatch.delenv("RACEME_TORCH", raising=False)
        for name, value in {
            "ROOT": folder,
            "VENV": self.venv,
            "LOG": self.venv / "set-up.log",
            "MADE_FOR": self.venv / "made-for",
            "STAMP": self.venv / "set-up-stamp",
            "CONSTRAINTS": folder / "constraints.txt",
            "LOCKS": folder / "requirements",
            "run": self.run,
            "missing_build_parts": list,
            "has_nvidia_gpu": lambda: False,
            "apt_prefix": lambda: None,
            "pip_configuration": lambda python: self.pip_configuration,
            "kept_wheels": lambda distribution: self.kept_wheels,
        }.items():
            monkeypatch.setattr(self.script, name, value)
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        (folder / "pyproject.toml").write_text("[project]\n")
        (folder / "constraints.txt").write_text("fastecdsa==2.3.2\ntorch==2.13.0\n")
        (folder / "requirements").mkdir()
        (folder / "requirements" / "all.lock").write_text(ALL_LOCK)

    def run(self, command: list[str], **environment: str) -> None:
        self.ran.append(command)
        self.environments.append(environment)
        self.on_run(command)

    def installed(self) -> list[str]:
        """The last word of each installation, of a lock its name."""
        return [Path(command[-1]).name or "." for command in self.ran if "install" in command]


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    return SetUp(tmp_path, monkeypatch)


def test_a_finished_set_up_is_not_run_again(set_up: SetUp):
    assert set_up.script.main() == 0
    set_up.ran.clear()
    assert set_up.script.main() == 0
    assert set_up.ran == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "requirements/all.lock"])
def test_a_changed_requirement_installs_again_into_the_same_environment(
    set_up: SetUp, tmp_path: Path, name: str
):
    assert set_up.script.main() == 0
    set_up.ran.clear()
    with (tmp_path / name).open("a") as file:
        file.write("# changed\n")
    assert set_up.script.main() == 0
    assert set_up.installed()[-3:] == REST
    assert not any("venv" in command for command in set_up.ran)


def test_kernels_are_compiled_last_and_a_machine_that_cannot_is_set_up_all_the_same(set_up: SetUp):
    def fail(command: list[str]) -> None:
        if command[-1].endswith("precompile"):
            raise set_up.script.CommandFailed("no compiler")

    set_up.on_run = fail
    assert set_up.script.main() == 0
    assert set_up.ran[-1][1:] == ["-m", "node.model.weights.precompile"]
    assert set_up.script.STAMP.exists()
    assert "no compiler" in set_up.script.LOG.read_text()


def test_an_interrupted_set_up_runs_again(set_up: SetUp, capsys: pytest.CaptureFixture[str]):
    def interrupt(command: list[str]) -> None:
        if command[-1].endswith("all.lock"):
            raise KeyboardInterrupt

    set_up.on_run = interrupt
    assert set_up.script.main() == 130
    assert "the next run goes on from here" in capsys.readouterr().err
    set_up.on_run = lambda command: None
    set_up.ran.clear()
    assert set_up.script.main() == 0
    assert set_up.installed()[-3:] == REST


def test_an_environment_that_was_not_finished_is_made_anew(set_up: SetUp):
    half = set_up.venv / "lib" / "half"
    half.mkdir(parents=True)
    assert set_up.script.main() == 0
    assert not half.exists()


def test_a_failed_stage_shows_the_end_of_its_log(set_up: SetUp, capsys: pytest.CaptureFixture[str]):
    def fail(command: list[str]) -> None:
        if command[-1].endswith("all.lock"):
            set_up.script.LOG.write_text("".join(f"line {number}\n" for number in range(100)))
            raise set_up.script.CommandFailed("pip failed with exit code 1")

    set_up.on_run = fail
    assert set_up.script.main() == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].strip() == "line 99"
    assert len(shown) == 21
    assert not set_up.script.STAMP.exists()


def test_nothing_is_installed_without_a_hash_but_this_project(set_up: SetUp):
    assert set_up.script.main() == 0
    *packages, ours = [command for command in set_up.ran if "install" in command]
    for command in packages:
        assert {"--require-hashes", "--no-deps", "--no-build-isolation", "-r"} <= set(command)
    assert ours[-4:] == ["--no-deps", "--no-build-isolation", "-e", "."]


def test_where_the_interpreter_came_without_venv_the_tool_in_its_place_has_a_hash_too(set_up: SetUp):
    set_up.on_run = lambda command: (
        listed.append(Path(command[-1]).read_text()) if "--target" in command else None
    )
    listed: list[str] = []
    (set_up.venv).mkdir()
    set_up.script.make_environment_with_virtualenv()
    assert listed == ["distlib==1 \\\n    --hash=sha256:aa\nvirtualenv==2 \\\n    --hash=sha256:dd\n"]
    assert "--require-hashes" in set_up.ran[0]


def test_torch_for_cpus_is_taken_where_the_index_offers_it(set_up: SetUp):
    assert set_up.script.main() == 0
    assert set_up.installed() == ["torch-cpu.lock", *REST]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("ERROR: No matching distribution found for torch==2.13.0+cpu\n", "pip's index offers no such build"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES ...\n", "its hash is not in requirements"),
        ("ERROR: ResolutionImpossible: for help visit ...\n", "pip could not install that build"),
        ("ERROR: HTTP error 403 while getting ...\n", "pip could not install that build"),
        ("", "pip could not install that build"),
    ],
)
def test_the_general_build_of_torch_is_tried_whatever_pip_says_of_the_other(
    set_up: SetUp, capsys: pytest.CaptureFixture[str], answer: str, said: str
):
    def fail(command: list[str]) -> None:
        if command[-1].endswith("torch-cpu.lock"):
            set_up.script.LOG.write_text(answer)
            raise set_up.script.CommandFailed("pip failed with exit code 1")

    set_up.on_run = fail
    assert set_up.script.main() == 0
    assert set_up.installed() == ["torch-cpu.lock", "torch.lock", *REST]
    assert said in capsys.readouterr().out
    log = set_up.script.LOG.read_text()
    assert answer in log
    assert "the general build is tried" in log


def test_a_failure_of_the_general_build_ends_set_up(set_up: SetUp):
    def fail(command: list[str]) -> None:
        if "torch" in command[-1]:
            raise set_up.script.CommandFailed("pip failed with exit code 1")

    set_up.on_run = fail
    assert set_up.script.main() == 1
    assert set_up.installed() == ["torch-cpu.lock", "torch.lock"]


def test_a_torch_of_your_own_is_the_only_one_tried(set_up: SetUp, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RACEME_TORCH", "torch==2.12.0")

    def fail(command: list[str]) -> None:
        raise set_up.script.CommandFailed("pip failed with exit code 1")

    (set_up.venv / "bin").mkdir(parents=True)
    set_up.script.MADE_FOR.write_text(set_up.script.made_for())
    set_up.on_run = fail
    assert set_up.script.main() == 1
    assert set_up.installed() == ["torch==2.12.0"]


CONFIGURED = r"""
:env:.default-timeout='180'
global.constraint='/etc/pip/constraints.txt'
global.extra-index-url='\nhttps://one.example/simple\nhttps://two.example/simple'
global.proxy='http://proxy.example:3128'
global.timeout='15'
global.user='true'
install.require-hashes='yes'
install.timeout='60'
freeze.timeout='1'
something that pip may print one day
"""


def test_pip_keeps_where_packages_come_from_and_nothing_else_of_its_configuration(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch
):
    set_up.pip_configuration = CONFIGURED
    monkeypatch.setenv("PIP_INDEX_URL", "https://three.example/simple")
    monkeypatch.setenv("PIP_CONSTRAINT", "mine.txt")
    monkeypatch.setenv("PIP_CONFIG_FILE", "mine.conf")
    assert set_up.script.main() == 0
    installs = [
        environment
        for command, environment in zip(set_up.ran, set_up.environments, strict=True)
        if "install" in command
    ]
    assert len(installs) == 4
    for environment in installs:
        assert environment == {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_CONSTRAINT": "",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_EXTRA_INDEX_URL": "https://one.example/simple https://two.example/simple",
            "PIP_INDEX_URL": "https://three.example/simple",
            "PIP_NO_INPUT": "1",
            "PIP_PROXY": "http://proxy.example:3128",
            "PIP_TIMEOUT": "60",
        }
    assert "left out: constraint, require-hashes, user" in set_up.script.LOG.read_text()


def test_what_is_missing_and_may_not_be_installed_is_said_in_one_line(
    set_up: SetUp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(set_up.script, "missing_build_parts", lambda: ["C compiler", "gmp.h"])
    monkeypatch.setattr(set_up.script, "fastecdsa_is_built", lambda: False)
    assert set_up.script.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "found no C compiler and no gmp.h" in line


def test_nothing_is_compiled_once_fastecdsa_is_there(set_up: SetUp, monkeypatch: pytest.MonkeyPatch):
    assert set_up.script.main() == 0
    (set_up.venv / "lib/python3.11/site-packages/fastecdsa-2.3.2.dist-info").mkdir(parents=True)
    monkeypatch.setattr(set_up.script, "missing_build_parts", lambda: pytest.fail("looked for a compiler"))
    set_up.script.STAMP.unlink()
    assert set_up.script.main() == 0


@pytest.mark.parametrize(
    ("kept", "compiles"),
    [
        ("", True),
        ("{wheel}-{tag}-{tag}-linux_x86_64.whl (80 kB)", False),
        ("{wheel}-cp27-cp27-linux_x86_64.whl (80 kB)", True),
        ("fastecdsa-1.0-{tag}-{tag}-linux_x86_64.whl (80 kB)", True),
    ],
)
def test_a_wheel_that_pip_kept_is_not_compiled_again(set_up: SetUp, kept: str, compiles: bool):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    set_up.kept_wheels = f"Cache contents:\n\n - {kept.format(wheel='fastecdsa-2.3.2', tag=tag)}\n"
    assert set_up.script.fastecdsa_is_built() != compiles
