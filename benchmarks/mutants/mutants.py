"""How many small changes to the pure modules a test notices: the score of mutmut.

    python -m benchmarks mutants [--sample 1500] [--modules 'routing/*'] [--show] [--json FILE]

mutmut (docs/decisions/0016-mutmut-over-the-pure-modules.md) works in a copy of the repository under
build/mutants.  benchmarks/mutants/mutants.toml says which modules are changed and which tests may notice.
The sample is drawn by a hash of the changes' names: the same code gives the same sample.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.lib.results import Run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("mutants.toml")
WORK = ROOT / "build" / "mutants"
FOLDERS = ("tensor_codec", "routing", "node", "client")
COPIED = (*FOLDERS, "tests", "benchmarks", "scripts", "docs", "README.md", "pyproject.toml")

# mutmut writes the exit code of pytest for each change, or a number of its own.
KILLED, SURVIVED, TIMEOUT, NO_TESTS, SKIPPED, NOT_TRIED = (
    "killed",
    "survived",
    "timeout",
    "no_tests",
    "skipped",
    "not_tried",
)
OUTCOMES: Mapping[int | None, str] = {
    None: NOT_TRIED,
    2: NOT_TRIED,  # interrupted
    1: KILLED,
    3: KILLED,
    0: SURVIVED,
    5: NO_TESTS,
    33: NO_TESTS,
    34: SKIPPED,
    36: TIMEOUT,
    24: TIMEOUT,
    152: TIMEOUT,
    255: TIMEOUT,
    -24: TIMEOUT,
    -9: TIMEOUT,
}
SKIP = 34


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A change without an effect on the results: the line before, the line after, and the reason."""

    module: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Config:
    """What benchmarks/mutants/mutants.toml says."""

    sample: int
    seconds: float
    workers: int
    first: str
    words: Sequence[str]
    modules: Sequence[str]
    left_out: Sequence[str]
    tests: Sequence[str]
    deselected: Sequence[str]
    equivalent: Sequence[Equivalent] = field(default=())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the changes, try them, print and write the score; 0, or 1 where mutmut fails."""
    config = read_config()
    parser = argparse.ArgumentParser(prog="python -m benchmarks mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=config.sample, help="changes to try; 0: all")
    parser.add_argument("--seconds", type=float, default=config.seconds, help="end of trying, in seconds")
    parser.add_argument("--workers", type=int, default=config.workers, help="processes")
    parser.add_argument("--modules", nargs="+", default=config.modules, metavar="PATTERN")
    parser.add_argument("--tests", nargs="+", default=config.tests, metavar="PATTERN")
    parser.add_argument("--show", action="store_true", help="print each change that no test noticed")
    parser.add_argument("--json", type=Path)
    flags, run, began = parser.parse_args(arguments), Run(), time.monotonic()
    copy_repository()
    write_settings(config, flags.modules, flags.tests)
    first = config.first if flags.modules == config.modules else "*__mutmut_1"
    # The first run makes the changes and finds which tests run which function; the second one tries the rest.
    failed = mutmut(["run", "--max-children", str(flags.workers), first], config.seconds)
    if not failed:
        choose(config, flags.sample)
        failed = mutmut(["run", "--max-children", str(flags.workers)], flags.seconds)
    if failed:
        print("error: mutmut failed, see above", file=sys.stderr)
        return 1
    result = {
        **outcome(config),
        "sampled": flags.sample > 0,
        "tool": f"mutmut {version('mutmut')}",
        "seconds": round(time.monotonic() - began),
    }
    print_result(result)
    if flags.show:
        for name, lines in survivors():
            print(name, *lines, sep="\n    ")
    run.write(flags.json, result)
    return 0


def read_config(path: Path = CONFIG) -> Config:
    """The configuration, with its lists of equivalent changes as values."""
    found: dict[str, Any] = tomllib.loads(path.read_text())  # Any: TOML
    return Config(**{**found, "equivalent": [Equivalent(**item) for item in found.get("equivalent", ())]})


# The copy that is changed


def copy_repository() -> None:
    """Copy the tracked files of the configured folders, in their present state, to build/mutants."""
    shutil.rmtree(WORK, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (WORK / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, WORK / name)


def write_settings(config: Config, modules: Sequence[str], tests: Sequence[str]) -> None:
    """Add mutmut's section to the copy's pyproject.toml."""
    files = sorted({str(path.relative_to(ROOT)) for pattern in tests for path in ROOT.glob(pattern)})
    deselected = [f"--deselect={name}" for name in config.deselected]
    settings: dict[str, object] = {
        "source_paths": FOLDERS,
        "only_mutate": modules,
        "do_not_mutate": config.left_out,
        "do_not_mutate_patterns": config.words,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-profile=mutants", *deselected],
        "pytest_add_cli_args_test_selection": files,
        "also_copy": [name for name in COPIED if name not in FOLDERS],
        "timeout_multiplier": 5.0,
        "timeout_constant": 2.0,
        "track_dependencies": False,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    with (WORK / "pyproject.toml").open("a") as file:
        print("\n[tool.mutmut]", *lines, sep="\n", file=file)


def mutmut(words: Sequence[str], seconds: float) -> int:
    """Run mutmut in the copy, its progress into build/mutants/mutmut.log; an interrupt ends it in time.

    Returns 0 after a normal end or the interrupt, else its exit code.
    """
    log = WORK / "mutmut.log"
    with log.open("a") as file:
        command = [sys.executable, "-m", "mutmut", *words]
        environment = {**os.environ, "PYTHONPATH": str(WORK)}
        process = subprocess.Popen(command, cwd=WORK, stdout=file, stderr=file, env=environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            return 0
    if code:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
    return code


# The changes, and their outcomes


def records() -> Iterator[tuple[str, Path, dict[str, Any]]]:  # Any: JSON
    """For each module that was changed: its name, the file with mutmut's outcomes, and its content."""
    for path in sorted(WORK.glob("mutants/**/*.py.meta")):
        found = json.loads(path.read_text())
        if found["exit_code_by_key"]:
            yield str(path.relative_to(WORK / "mutants")).removesuffix(".meta"), path, found


def choose(config: Config, sample: int) -> None:
    """Mark the changes that are not tried: equivalent changes, and changes outside the sample."""
    found = list(records())
    skipped = {name for module, path, record in found for name in equivalents(config, module, path, record)}
    others = [name for _, _, record in found for name in record["exit_code_by_key"] if name not in skipped]
    drawn = sorted(others, key=lambda name: hashlib.sha256(name.encode()).digest())
    skipped.update(drawn[sample:] if sample else ())
    for _, path, record in found:
        codes = record["exit_code_by_key"]
        record["exit_code_by_key"] = {name: SKIP if name in skipped else code for name, code in codes.items()}
        path.write_text(json.dumps(record, indent=4))


def equivalents(config: Config, module: str, path: Path, record: Mapping[str, Any]) -> Iterator[str]:
    """The names of the module's changes that the configuration lists as equivalent."""
    listed = {(item.before, item.after) for item in config.equivalent if item.module == module}
    if listed:
        functions = functions_of(path)
        for name in record["exit_code_by_key"]:
            lines = difference(functions, name)
            removed = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
            added = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
            if (removed, added) in listed:
                yield name


def functions_of(record: Path) -> dict[str, list[str]]:
    """The lines of every function in a changed module, without comments, under the names that mutmut gave."""
    text = record.with_suffix("").read_text()
    kept = [re.sub(r"\s+# .*$", "", line) for line in text.splitlines()]  # without comments, mutmut's too
    return {
        node.name: [line.strip() for line in kept[node.lineno - 1 : node.end_lineno]]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def difference(functions: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """The lines that a change takes away ("-...") and puts there ("+..."), without their indent."""
    changed = name.rpartition(".")[2]
    original = re.sub(r"__mutmut_\d+$", "__mutmut_orig", changed)
    before = [line.replace(original, "") for line in functions[original]]
    after = [line.replace(changed, "") for line in functions[changed]]
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in lines if not line.startswith("@@")]


def survivors() -> Iterator[tuple[str, list[str]]]:
    """Each change that no test noticed: its name and its lines."""
    for _, path, record in records():
        functions = functions_of(path)
        for name, code in record["exit_code_by_key"].items():
            if OUTCOMES.get(code, KILLED) in (SURVIVED, NO_TESTS):
                yield name, difference(functions, name)


def outcome(config: Config) -> dict[str, Any]:
    """The score, and per module the numbers of changes by outcome.

    The score is the share of killed changes and of changes after which a test takes far too long, among
    all that were tried.  A change in a function that no test runs counts as tried.
    """
    modules = {
        module: Counter(OUTCOMES.get(code, KILLED) for code in record["exit_code_by_key"].values())
        for module, _, record in records()
    }
    total = sum(modules.values(), Counter[str]())
    return {
        "score": score(total),
        "outcomes": dict(sorted(total.items())),
        "modules": {
            name: {"score": score(counts), **dict(sorted(counts.items()))} for name, counts in modules.items()
        },
        "equivalent": len(config.equivalent),
    }


def score(counts: Mapping[str, int]) -> float | None:
    """Of the changes that were tried, the share that was noticed; None where none was tried."""
    noticed = counts.get(KILLED, 0) + counts.get(TIMEOUT, 0)
    tried = noticed + counts.get(SURVIVED, 0) + counts.get(NO_TESTS, 0)
    return round(noticed / tried, 4) if tried else None


def print_result(result: Mapping[str, Any]) -> None:
    """A line for each module, and one for all."""
    for name, counts in (
        *result["modules"].items(),
        ("all", {"score": result["score"], **result["outcomes"]}),
    ):
        rest = "  ".join(f"{key} {value}" for key, value in counts.items() if key != "score")
        print(f"  {name:45} {'-' if counts['score'] is None else format(counts['score'], '.3f')}  {rest}")
