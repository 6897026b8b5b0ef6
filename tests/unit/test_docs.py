"""What the manual says is so: its links lead somewhere, its commands parse, its tables are the code's."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import client
from client.connect import Swarm
from node.model.architecture import ARCHITECTURES
from tensor_codec.errors import REFUSALS
from tensor_codec.limits import Limits
from tensor_codec.messages import FAULTS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
PEER = "/ip4/10.0.0.5/tcp/31330/p2p/12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table behind a line that begins with `heading`, as cells without backticks."""
    lines = iter(text[text.index(heading) :].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("| ").split(" | ")])
        elif rows:
            break
    return rows[2:]  # without the head and the line below it


# Links


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_relative_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


# Commands


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every `python -m MODULE WORDS` in a file, whether in a code block or in a line of text."""
    text = path.read_text().replace("\\\n", " ")
    for module, rest in re.findall(r"python -m (node|client|benchmarks\.\w+)\b([^\n`|]*)", text):
        words = [word for word in shlex.split(rest, comments=True) if not word.startswith("[")]
        if all(re.fullmatch("[a-z-]+", word) and word[0] != "-" for word in words):
            words.append("--help")  # a command is named, not shown: it must exist
        yield module, [PEER if word == "..." else word for word in words]


COMMANDS = [
    pytest.param(module, words, id=" ".join([name_of(path), module, *words])[:80])
    for path in DOCS
    for module, words in commands(path)
]


class Parsed(Exception):
    """A command line was understood."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse_args(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_every_command_in_the_manual_parses(module, words, stop_after_parsing, monkeypatch):
    program = importlib.import_module(module if "." in module else f"{module}.__main__")
    monkeypatch.setattr("sys.argv", [module, *words])
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            program.main()
    else:
        with pytest.raises(Parsed):
            program.main()


def test_the_manual_shows_every_command():
    shown = {(module, words[0]) for path in DOCS for module, words in commands(path) if words}
    for command in ("bootstrap", "status", "models", "new-swarm-key"):
        assert ("node", command) in shown
    assert {("client", "generate"), ("client", "chat")} <= shown


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_make_target_in_the_manual_exists(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    quoted = re.findall(r"`make ([^`]*)`", text) + re.findall(r"^    make (.*)$", text, re.MULTILINE)
    for words in (shlex.split(line, comments=True) for line in quoted):
        assert {word for word in words if "=" not in word} <= targets


# Python


SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_calls_in_the_snippets_fit_the_functions_that_they_call(snippet):
    known = {"client.connect": client.connect}
    known |= {
        f"swarm.{name}": getattr(Swarm, name)
        for name in ("generate", "session", "conversation", "route", "forward", "backward")
    }
    tree = compile(snippet, "README.md", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = known.get(ast.unparse(call.func))
        if function is not None:
            given = [None] * (len(call.args) + ast.unparse(call.func).startswith("swarm."))
            inspect.signature(function).bind(*given, **{word.arg: None for word in call.keywords})


# Tables


UNITS = {"s": 1, "KiB": 1024, "MiB": 1024 * 1024}


def test_the_table_of_limits_is_the_code_s():
    rows = table((ROOT / "docs" / "protocol.md").read_text(), "## 6. Limits")
    printed = {}
    for name, default, *_ in rows:
        number, _, unit = default.partition(" ")
        printed[name] = None if number == "none" else float(number) * UNITS.get(unit, 1)
        assert unit in ("", *UNITS), default
    assert len(rows) == len(printed)
    assert printed == {field.name: field.default for field in fields(Limits)}


def test_the_table_of_error_codes_is_the_code_s():
    rows = table((ROOT / "docs" / "protocol.md").read_text(), "## 7. Errors")
    codes = {**REFUSALS, **FAULTS}
    assert {row[0]: row[2] for row in rows} == {code: kind.__name__ for code, kind in codes.items()}


def test_the_readme_lists_the_supported_architectures():
    text = README.read_text()
    listed = text[text.index("models of these types:") :].partition(":")[2].partition(".")[0]
    assert {name.strip() for name in listed.split(",")} == set(ARCHITECTURES)
    assert f"{len(ARCHITECTURES)} architectures" in text


# Names and messages


def sources() -> str:
    """All of our code, with string literals that span lines put together."""
    text = "\n".join(
        path.read_text()
        for folder in ("tensor_codec", "routing", "node", "client")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_message_that_the_manual_explains_is_in_the_code():
    rows = table((ROOT / "docs" / "operating.md").read_text(), "## When it does not work")
    code = sources()
    assert len(rows) > 30
    for message in (part for row in rows for part in row[0].split(", ")):
        pieces = re.split(r"\b(?:[A-Z]\d?|FILE|A:B|M|0:N|\d+|cuda)\b|\.\.\.", message)
        literal = [piece.strip(" :,") for piece in pieces if len(piece.strip(" :,")) >= 4]
        assert literal, message
        for piece in literal:
            assert piece in code, f"{message!r}: {piece!r} is said nowhere"
