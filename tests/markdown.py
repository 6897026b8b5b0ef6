"""Our documents, as tests read them: tables, sections, and figures within sentences."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    """The text of a document, its lines joined where a sentence goes on."""
    return re.sub(r"(?<=[^\n|])\n(?![\n|#\-` ]|\d+\. )", " ", (ROOT / name).read_text())


def in_one_line(name: str) -> str:
    """The text of a document without its line breaks."""
    return " ".join((ROOT / name).read_text().split())


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next one of its rank or above."""
    begin = text.index(f"\n{heading}") + 1
    rank = len(heading) - len(heading.lstrip("#"))
    rest = text[text.index("\n", begin) :]
    end = re.search(rf"^#{{1,{rank}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table behind a line that begins with `heading`, as cells without backticks."""
    lines = iter(text[text.index(heading) :].splitlines())
    rows = []
    for line in lines:
        if line.startswith("|"):
            inner = line.strip().removeprefix("|").removesuffix("|")
            rows.append([cell.strip().replace("`", "") for cell in inner.split("|")])
        elif rows:
            break
    return rows[2:]  # without the head and the line below it


def words(cell: str) -> list[str]:
    """The names in a cell of a table."""
    return [word.strip() for word in cell.split(",") if word.strip()]
