"""What the manual says is so: its links lead somewhere, its commands parse, its tables are the code's."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import io
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import client
from benchmarks.__main__ import BENCHMARKS as NAMES_OF_BENCHMARKS
from client.generation.options import OPTION_NAMES
from client.swarm import Swarm
from node.config import VERSION, NetworkConfig
from node.main import write_ready_file
from node.model.checkpoint.architecture import ARCHITECTURES
from node.runtime.logs import JsonLines
from routing.chains.alternatives import Constraints
from tensor_codec.errors import REFUSALS
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import FAULTS
from tests.markdown import ROOT, in_one_line, section, table, words

README = ROOT / "README.md"
SWARM_PAGE = ROOT / "docs" / "your-own-swarm.md"
PYTHON_PAGE = ROOT / "docs" / "using-from-python.md"
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
PEER = "/ip4/10.0.0.5/tcp/31330/p2p/12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


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
    """Every `python -m PROGRAM WORDS` in a file, whether in a code block or in a line of text.

    PROGRAM: node, client, or "benchmarks NAME".
    """
    text = path.read_text().replace("\\\n", " ")
    for module, rest in re.findall(r"python -m (node|client|benchmarks [a-z_]+)\b([^\n`|]*)", text):
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
    package, *name = module.split()
    program = importlib.import_module(f"{package}.__main__")
    monkeypatch.setattr("sys.argv", [package, *name, *words])
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
    commands_of_clients = {("client", name) for name in ("generate", "chat", "adapters", "gateway")}
    assert commands_of_clients <= shown


# Flags


PROGRAMS: dict[str, tuple[str, ...]] = {
    "node": ("", "bootstrap", "status", "models", "prepare", "new-swarm-key"),
    "client": (
        "generate",
        "chat",
        "gateway",
        "adapters",
        "adapters list",
        "adapters show",
        "adapters get",
        "adapters seed",
    ),
}
BENCHMARKS = {"benchmarks": tuple(NAMES_OF_BENCHMARKS)}
SCRIPTS = [
    path
    for folder in ("scripts", "examples", "tests/sim", "tests/hostile")
    for path in sorted((ROOT / folder).glob("*.py"))
]
OF_OTHER_PROGRAMS = {"--strict", "--upgrade"} | {  # of mypy and pip; of Docker, useradd and systemctl
    *("--build-arg", "--cap-drop", "--detach", "--entrypoint", "--env", "--file", "--publish", "--read-only"),
    *("--rm", "--security-opt", "--stop-timeout", "--tmpfs", "--user", "--volume"),
    *("--home-dir", "--now", "--shell", "--system"),
}


@cache
def help_of(module: str, command: str = "") -> str:
    """What `python -m MODULE COMMAND --help` prints."""
    program = importlib.import_module(f"{module}.__main__")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("sys.argv", [module, *command.split(), "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            program.main()
    return printed.getvalue()


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))


def flags_of(programs: Mapping[str, Sequence[str]]) -> set[str]:
    return {
        flag
        for module, commands in programs.items()
        for command in commands
        for flag in flags_in(help_of(module, command))
    }


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_flag_in_the_manual_exists(path):
    known = flags_of(PROGRAMS) | OF_OTHER_PROGRAMS
    for paragraph in path.read_text().split("\n\n"):
        if unknown := flags_in(paragraph) - known:
            scripts = flags_in("".join(script.read_text() for script in SCRIPTS))
            assert unknown - scripts <= flags_of(BENCHMARKS), paragraph


def test_every_flag_of_a_node_and_a_client_is_in_the_manual():
    explained = flags_in("".join(path.read_text() for path in DOCS))
    assert flags_of(PROGRAMS) - explained == set()


def test_the_table_of_commands_gives_each_the_flags_that_it_has():
    for usage, what in table(SWARM_PAGE.read_text(), "| command | what it does |"):
        module, *rest = shlex.split(usage.removeprefix("python -m "))
        command = rest[0] if rest and re.fullmatch("[a-z-]+", rest[0]) else ""
        assert command in PROGRAMS[module]
        assert flags_in(usage + what) <= flags_in(help_of(module, command)), usage


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_make_target_in_the_manual_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    quoted = re.findall(r"`make ([^`]*)`", text) + re.findall(r"^    make (.*)$", text, re.MULTILINE)
    for command in (shlex.split(line, comments=True) for line in quoted):
        assert {word for word in command if "=" not in word} <= targets


# Python


SNIPPETS = [
    snippet
    for page in (README, PYTHON_PAGE)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


def test_the_documents_have_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_calls_in_the_snippets_fit_the_functions_that_they_call(snippet):
    known = {"client.connect": client.connect, "client.connect_sync": client.connect_sync}
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
        if function is Swarm.generate:
            names = {word.arg for word in call.keywords} - set(inspect.signature(function).parameters)
            assert names <= OPTION_NAMES


# Tables


UNITS = {"s": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def test_the_table_of_limits_is_the_code_s():
    rows = table((ROOT / "docs" / "protocol.md").read_text(), "## 6. Limits")
    printed = {}
    for name, default, *_ in rows:
        number, _, unit = default.partition(" ")
        printed[name] = None if number == "none" else float(number) * UNITS.get(unit, 1)
        assert unit in ("", *UNITS), default
    assert len(rows) == len(printed)
    assert printed == {field.name: field.default for field in fields(Limits)}


def test_the_flags_of_limits_have_the_defaults_that_the_manual_says():
    limits = Limits()
    rows = table((ROOT / "docs" / "operating.md").read_text(), "| flag | default | |")
    assert len(rows) >= 5
    for flag, default, _ in rows:
        field = flag.split()[0].removeprefix("--").replace("-", "_")
        value = getattr(limits, field)
        assert default == ("the cache" if value is None else f"{value:g}" if value < 1e5 else str(value)), (
            flag
        )
    fits = re.search(r"([\d,]+) positions of ([\d,]+) values in fp32 fit", in_one_line("docs/operating.md"))
    assert fits
    positions, values = (int(word.replace(",", "")) for word in fits.groups())
    assert limits.step_tokens(4 * values) == positions


def test_the_table_of_error_codes_is_the_code_s():
    rows = table((ROOT / "docs" / "protocol.md").read_text(), "## 7. Errors")
    codes = {**REFUSALS, **FAULTS}
    assert {row[0]: row[2] for row in rows} == {code: kind.__name__ for code, kind in codes.items()}


def test_the_supported_architectures_are_listed():
    text = (ROOT / "docs" / "requirements.md").read_text()
    listed = text[text.index("models of these types:") :].partition(":")[2].partition(".")[0]
    assert {name.strip() for name in listed.split(",")} == set(ARCHITECTURES)
    assert f"{len(ARCHITECTURES)} architectures" in text
    assert f"{len(ARCHITECTURES)} architectures" in (ROOT / "docs" / "compared-with-petals.md").read_text()


def test_the_fields_of_constraints_and_their_flags_are_the_code_s():
    names = {field.name for field in fields(Constraints)}
    rows = table((ROOT / "docs" / "operating.md").read_text(), "## Which servers a client uses")
    assert {name for row in rows for name in words(row[1])} == names
    given = flags_in(" ".join(row[0] for row in rows))
    assert given <= flags_in(help_of("client", "generate")) & flags_in(help_of("client", "chat"))
    listed = re.search(
        r"The fields are (.*?); on the command line (.*?)\. `", in_one_line("docs/using-from-python.md")
    )
    assert listed
    assert set(re.findall(r"`(\w+)`", listed[1])) == names
    assert flags_in(listed[2]) == given


def test_the_calls_of_a_swarm_in_the_documents_exist():
    text = README.read_text() + PYTHON_PAGE.read_text()
    for name in set(re.findall(r"`?swarm\.(\w+)\(", text)):
        assert callable(getattr(Swarm, name, None) or getattr(client.SyncSwarm, name)), name
    for name in re.findall(r"`client\.(\w+)", text):
        package = ROOT / "client" / name
        assert hasattr(client, name) or package.is_dir() or package.with_suffix(".py").exists(), name


def test_the_map_of_the_project_is_that_of_the_tree():
    shown = section((ROOT / "docs" / "README.md").read_text(), "### Where things are")
    folder, listed = "", set()
    for indent, name in re.findall(r"^ {4}( {0,2})([\w/]+/|\w+\.py) ", shown, re.MULTILINE):
        folder = folder if indent else name
        assert (ROOT / folder / name if indent else ROOT / name).exists(), name
        listed.add(f"{folder}{name}" if indent else name)
    for package in ("routing", "node", "client"):
        inside = {f"{package}/{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
        assert inside <= listed


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in sorted((ROOT / "docs").rglob("*.md")):
        assert path.name == "README.md" or f"]({path.relative_to(ROOT / 'docs')})" in index, path.name


def test_the_page_on_python_has_every_option_of_generate_and_no_other():
    text = PYTHON_PAGE.read_text()
    begin = text.index("| options of `generate` |")
    listed = set(re.findall(r"`([a-z]\w+)`", text[begin : text.index("\n\n", begin)]))
    parameters = inspect.signature(Swarm.generate).parameters
    taken = {name for name in parameters if name not in ("self", "prompt", "options", "arguments")}
    taken |= OPTION_NAMES
    assert listed - taken <= {"generate"}
    for option in taken - listed:
        assert re.search(rf"`{option}`|\b{option}=", text), f"{option} is not in {PYTHON_PAGE.name}"


def test_the_view_of_a_swarm_in_the_manual_has_the_columns_and_the_words_of_status():
    shown = SWARM_PAGE.read_text().split("```text\n")[-1].split("```")[0].splitlines()
    code = (ROOT / "node" / "monitor" / "status.py").read_text()
    columns = [
        name for line in re.findall(r"for column in \((.*?)\):", code) for name in ast.literal_eval(line)
    ]
    assert shown[1].split() == " ".join(columns).split()
    for words_of_line in (
        "every block is served",
        "servers of each block:",
        "served by one server only: blocks",
    ):
        assert words_of_line in code
        assert any(words_of_line in line for line in shown)


def test_what_happened_to_a_session_is_told_in_the_kinds_of_the_manual():
    listed = re.search(r"Kinds: (.*?)\. In Python", in_one_line("docs/operating.md"))
    assert listed
    code = "\n".join(path.read_text() for path in sorted((ROOT / "client").rglob("*.py")))
    kinds = set(re.findall(r"(?:trace\.add|\bNote)\(\s*\"(\w+)\"", code))
    assert set(re.findall(r"`(\w+)`", listed[1])) == kinds


def test_the_ready_file_and_the_log_have_the_keys_of_the_manual(tmp_path):
    text = in_one_line("docs/operating.md")
    ready = re.search(r"JSON, written whole once the node is online: (.*?)\. Remove", text)
    assert ready
    node: Any = SimpleNamespace(host=SimpleNamespace(peer_id="p", addresses=()))
    write_ready_file(NetworkConfig(ready_file=tmp_path / "ready"), node, None)
    assert set(re.findall(r"`(\w+)`", ready[1])) == json.loads((tmp_path / "ready").read_text()).keys()
    logged = re.search(r"gives one object a line: (.*?)\. Prompts", text)
    assert logged
    try:
        raise ValueError
    except ValueError:
        record = logging.LogRecord("raceme", logging.INFO, "", 1, "x", (), sys.exc_info())
    assert set(re.findall(r"`(\w+)`", logged[1])) == json.loads(JsonLines().format(record)).keys()


def test_a_release_has_its_section_of_changes():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert VERSION in {version for version, _ in headings}
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    begin = text.index(f"## [{VERSION}]")
    newest = text[begin : text.find("\n## ", begin + 1) if "\n## " in text[begin + 1 :] else None]
    assert "\n- " in newest, "the newest version says nothing"
    for line in newest.splitlines():
        assert line == "" or line.startswith(("## ", "### ", "- ", "  ")), line


# Names and messages


def literals() -> set[str]:
    """Every text in our code as a reader may see it: what is filled in is a NUL."""

    def shown(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(shown(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return shown(node.left) + shown(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"

    found = (
        shown(node)
        for folder in ("tensor_codec", "routing", "node", "client")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
    )
    return {text for text in found if text.strip("\0")}


FILLED_IN = r"\b(?:A:B|0:N|[A-Z]\d?|FILE|FOLDER|\d+|cuda)\b|\.\.\."


def test_every_message_that_the_manual_explains_is_said_by_the_code():
    """Word by word, in one text of the code, with something filled in where the manual has a placeholder."""
    rows = table((ROOT / "docs" / "operating.md").read_text(), "## When it does not work")
    texts = literals()
    assert len(rows) > 30
    for message in (part for row in rows for part in re.split(", |: ", row[0])):
        pieces = re.split(FILLED_IN, message)
        assert max(len(piece.strip()) for piece in pieces) >= 4, message
        # A figure of the manual's may stand in the code as it is.
        given = "".join(
            re.escape(piece) + (f"(?:{re.escape(gap)}|[^\\0]*\\0.*?)" if gap else "")
            for piece, gap in zip(pieces, [*re.findall(FILLED_IN, message), ""], strict=True)
        )
        assert any(re.search(given, text, re.DOTALL) for text in texts), f"{message!r} is said nowhere"
