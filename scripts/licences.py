"""Writes docs/licences.md: the licence of every package of requirements/*.lock, as the package states it.

    .venv/bin/python scripts/licences.py

A package that is not installed here (another Python's, a CUDA library) keeps its row of the same version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/licences.md"
UNKNOWN = "not stated"
SHORT = 60  # characters of a free text that is a licence's name
HEAD = """\
# Licences

The packages that `make env` installs, with the licence that each one states. `python scripts/licences.py`
writes this page. Raceme is under Apache-2.0 ([LICENSE](../LICENSE), [NOTICE](../NOTICE)). `cuda-*`,
`nvidia-*` and `triton` come with the general build of torch under Linux alone.

| package | version | licence |
| --- | --- | --- |
"""


def main() -> int:
    """Write the page; the packages whose licence is not known are named."""
    page = ROOT / PAGE
    known = rows_of(page.read_text()) if page.exists() else {}
    rows: dict[str, tuple[str, str]] = {}
    for name, version in locked(ROOT).items():
        found = licence_of(name, version)
        if found is None and name in known and known[name][0] == version:
            found = known[name][1]
        rows[name] = version, found or UNKNOWN
    lines = [f"| {name} | {version} | {found} |\n" for name, (version, found) in rows.items()]
    page.write_text(HEAD + "".join(lines))
    missing = [name for name, (_, found) in rows.items() if found == UNKNOWN]
    for name in missing:
        print(f"licences: {name} is not installed here, or states none", file=sys.stderr)
    return 0


def locked(root: Path) -> dict[str, str]:
    """Name -> version of the packages in all locks, by name; torch without its local label."""
    text = "".join(path.read_text() for path in (root / "requirements").glob("*.lock"))
    return dict(sorted(re.findall(r"^([\w.-]+)==([^\s+;]+)", text, re.MULTILINE)))


def rows_of(page: str) -> dict[str, tuple[str, str]]:
    """Name -> version and licence in the page."""
    found = re.findall(r"^\| ([\w.-]+) \| (\d\S*) \| (.+) \|$", page, re.MULTILINE)
    return {name: (version, licence) for name, version, licence in found}


def licence_of(name: str, version: str) -> str | None:
    """What the installed package of this version states; None where it is not installed."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    return stated(found.metadata.json) if found.version.partition("+")[0] == version else None


def stated(metadata: Mapping[str, str | list[str]]) -> str | None:
    """The expression of a package's metadata, else a short free text, its classifiers, or a text's title."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    text = str(metadata.get("license", "")).strip()
    title = text.partition("\n")[0]
    if title == text and 0 < len(text) <= SHORT:
        return text
    values = [value for value in metadata.get("classifier", ()) if value.startswith("License ::")]
    kinds = "; ".join(value.rpartition(" :: ")[2] for value in values)
    return kinds or (title if 0 < len(title) <= SHORT else None)


if __name__ == "__main__":
    sys.exit(main())
