"""Files of results: figures, and with them the command, the commit and the machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import Elsewhere, machine

ROOT = Path(__file__).resolve().parents[2]
CODE = ("tensor_codec", "routing", "node", "client", "benchmarks", "scripts")
Result = Mapping[str, Any]  # Any: JSON


class Run:
    """One measurement, from its start to the file of its results.

    Made before the measurement: it counts the load by other programs from its start.
    """

    def __init__(self, program: str = "benchmarks") -> None:
        """program: the module that was run."""
        self._program = program
        self._elsewhere = Elsewhere()

    def write(self, file: str | Path | None, found: Result | Sequence[Result]) -> None:
        """Write one result or several as JSON, each with the keys of `about`; nothing without a file."""
        if file is None:
            return
        about = self.about()
        rows = {**about, **found} if isinstance(found, Mapping) else [{**about, **row} for row in found]
        Path(file).write_text(json.dumps(rows, indent=2) + "\n")

    def about(self) -> dict[str, Any]:
        """command, commit, machine: the origin of a result."""
        about = {**machine(), "others": self._elsewhere.share()}
        return {"command": command(sys.argv[1:], self._program), "commit": commit(), "machine": about}


def command(words: Sequence[str], program: str = "benchmarks") -> str:
    """The command line to repeat, without `--json FILE` and `--inside`."""
    shown = [word for word in words if word != "--inside"]
    while "--json" in shown:
        at = shown.index("--json")
        del shown[at : at + 2]
    return shlex.join(["python", "-m", program, *shown])


def commit() -> str:
    """The commit that runs, in twelve digits, with "+" where the code was changed since; else "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no", "--", *CODE))
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an archive of the files
        return "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
