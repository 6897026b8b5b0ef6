"""A lab whose workers have not to import anything first: see `tests.forked`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.forked import ForkedWithPipes
from tests.netlab.lab import Lab


class ForkingLab(Lab):
    """folder: for the standard errors of workers, a file each."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._workers = 0

    def worker(self, host: str, module: str, arguments: Sequence[str]) -> ForkedWithPipes:
        """As of `Lab`, but forked."""
        command = [*self.enter(host), sys.executable, "-m", module, *arguments]
        errors = self._folder / f"{host}-{self._workers}.log"
        self._workers += 1
        process = ForkedWithPipes(command, os.environ, errors)
        self.keep(process)
        return process
