"""docs/faults.md names tests by their sentences: they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows():
    text = (ROOT / "docs" / "faults.md").read_text()
    return [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]


def test_every_test_that_the_page_of_faults_names_exists():
    named = [sentence for row in rows() for sentence in re.findall(r'"([^"]+)"', row)]
    assert len(named) > 20
    defined = re.findall(
        r"def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    )
    for sentence in named:
        name = "test_" + re.sub(r"\W+", "_", sentence.strip())
        assert name in defined, f"no test says that {sentence}"


def test_every_fault_stands_on_the_page_once():
    numbers = [int(row.split("|")[1]) for row in rows()]
    assert numbers == sorted(set(numbers))
