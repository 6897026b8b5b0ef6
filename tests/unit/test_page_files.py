"""The files of the gateway's page: their origin, what they ask for, and the examples that test them."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.api_contract import (
    CONTRACTS,
    SESSION_EVENTS,
    event_problems,
    peer,
    problems,
    session,
    silent,
    swarm,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "client" / "gateway" / "page"
ASSETS = PAGE / "assets"
VENDORED: list[dict[str, Any]] = json.loads((PAGE / "vendor.json").read_text())
OWN = sorted(path for path in PAGE.rglob("*") if path.suffix in (".js", ".css", ".html", ".svg"))
OWN = [path for path in OWN if path.parent.name != "vendor"]
NAMES = {"http://www.w3.org/2000/svg"}  # of XML, not addresses
COMMENT = "https://github.com/leeoniya/uPlot"  # in the head of the minified file


def name_of(path: Path) -> str:
    return str(path.relative_to(PAGE))


def test_every_library_is_the_one_of_the_manifest():
    listed = {file: digest for library in VENDORED for file, digest in library["files"].items()}
    there = {str(path.relative_to(ASSETS)) for path in (ASSETS / "vendor").iterdir()}
    assert listed.keys() == there
    for file, digest in listed.items():
        assert hashlib.sha256((ASSETS / file).read_bytes()).hexdigest() == digest, file


def test_every_library_has_its_licence_beside_it_and_in_the_notice():
    notice = (ROOT / "NOTICE").read_text()
    for library in VENDORED:
        assert library["version"]
        assert library["source"]
        assert f"{library['name']} ({library['licence']}" in notice
        texts = [file for file in library["files"] if file.endswith(".LICENSE.txt")]
        assert texts, library["name"]
        titles = {"MIT": "MIT License", "Apache-2.0": "Apache License"}
        assert titles[library["licence"]] in (ASSETS / texts[0]).read_text()


def test_no_file_of_the_page_has_an_address_of_another_host():
    for path in [*OWN, *(ASSETS / "vendor").glob("*.js"), *(ASSETS / "vendor").glob("*.css")]:
        found = set(re.findall(r"(?:https?:|wss?:)?//[\w.-]+\.[a-z]{2,}[^\s\"'`)]*", path.read_text()))
        assert found - NAMES - {name.removeprefix("http:") for name in NAMES} - {COMMENT} == set(), path.name


@pytest.mark.parametrize("path", OWN, ids=name_of)
def test_nothing_is_parsed_as_html_or_run_from_a_string(path: Path):
    text = path.read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in text, word
    assert "dangerouslySetInnerHTML" not in text
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


@pytest.mark.parametrize("path", [each for each in OWN if each.suffix == ".js"], ids=name_of)
def test_every_import_of_a_script_is_a_file_of_the_page(path: Path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("// ")
    assert len(first.split()) >= 4
    for target in re.findall(r"(?:from|import) \"([^\"]+)\"", path.read_text()):
        assert target.startswith("."), target
        assert (path.parent / target).resolve().is_file(), target


def test_the_files_of_the_page_are_part_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["client.gateway.page"]
    files = [path for path in PAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files
    for path in files:
        assert any(fnmatch(name_of(path), pattern) for pattern in patterns), name_of(path)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_readme_shows_the_page(theme: str):
    picture = ROOT / "docs" / f"page-{theme}.png"
    assert f"docs/{picture.name}" in (ROOT / "README.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 300_000


# The examples


SERVERS = [peer(1, "demo-1", (0, 10)), silent(peer(2, "demo-2", (10, 20))), peer(3, "", None)]


def test_the_examples_keep_to_the_contract():
    assert problems(swarm(SERVERS), CONTRACTS["swarm"]) == []
    assert problems(swarm([]), CONTRACTS["swarm"]) == []
    sessions = {"at": 1.0, "sessions": [session(1, SERVERS[:2])]}
    assert problems(sessions, CONTRACTS["sessions"]) == []


def test_a_silent_server_of_an_example_leaves_a_hole():
    assert swarm(SERVERS)["models"][0]["holes"] == [[10, 30]]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"at": 1}, "$.peer is missing"),
        ({"at": True, "peer": "p", "name": "", "what": "joined", "blocks": None}, "$.at is True"),
        ({"at": 1, "peer": "p", "name": "", "what": "gone", "blocks": None}, "$.what is 'gone'"),
        ({"at": 1, "peer": "p", "name": "", "what": "left", "blocks": [1]}, "$.blocks is [1]"),
        ([], "$ is [], no object"),
    ],
)
def test_the_checker_finds_what_breaks_the_contract(value: Any, found: str):
    assert any(each.startswith(found) for each in event_problems("peer", value))


def test_the_checker_knows_the_events_of_a_session():
    whole = {"at": 1, "id": "r", "what": "recovered", "seconds": 0.1}
    assert event_problems("session", whole) == []
    assert event_problems("session", whole | {"seconds": None})
    assert event_problems("session", whole | {"what": "born"})
    assert event_problems("news", {})
    assert set(SESSION_EVENTS) > {"fault", "steps"}
