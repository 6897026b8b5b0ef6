"""A lab whose workers have not to import anything first: see `tests.forked`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.forked import ForkedWithPipes
from tests.netlab.lab import Lab
from tests.netlab.namespaces import Program

ERROR_CHARACTERS = 2000  # the end of a worker's standard error


class ForkingLab(Lab):
    """folder: for the standard errors of workers, a file each."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._errors: dict[Program, Path] = {}

    def worker(self, host: str, module: str, arguments: Sequence[str]) -> ForkedWithPipes:
        """As of `Lab`, but forked."""
        command = [*self.enter(host), sys.executable, "-m", module, *arguments]
        errors = self._folder / f"{host}-{len(self._errors)}.log"
        process = ForkedWithPipes(command, os.environ, errors)
        self._errors[process] = errors
        self.keep(process)
        return process

    def errors_of(self, process: Program) -> str:
        """See `Lab`."""
        return self._errors[process].read_text()[-ERROR_CHARACTERS:] if process in self._errors else ""
