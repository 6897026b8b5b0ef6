"""Child processes that say in lines of JSON what happens, and are told things on standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Said = Mapping[str, Any]  # Any: JSON


class ProcessEnded(Exception):
    """A process ended before it said what was waited for."""


class Talking:
    """A running `python -m MODULE WORDS`.  said: its lines so far.  Made by `talking`."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process = process
        self.said: list[Said] = []
        self._name = name
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def tell(self, word: str) -> None:
        """A line on its standard input.  Nothing happens where it has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except OSError:
            return

    def all(self, key: str) -> list[Any]:
        """The values of a key in all lines so far."""
        return [line[key] for line in list(self.said) if key in line]

    def wait_for(self, key: str, seconds: float, times: int = 1) -> Any:
        """The value of a key, once so many lines have it.  Raises ProcessEnded, also after `seconds`."""
        deadline = time.monotonic() + seconds
        while len(found := self.all(key)) < times:
            if time.monotonic() > deadline or (
                self.process.poll() is not None and not self._thread.is_alive()
            ):
                raise ProcessEnded(f"{self._name} did not say {key!r} within {seconds:g} s")
            time.sleep(0.01)
        return found[times - 1]


@contextmanager
def talking(module: str, words: Sequence[str], stderr: Path) -> Iterator[Talking]:
    """A process that ends with the block.  stderr: the file of its standard error."""
    with stderr.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    with process:
        try:
            yield Talking(process, module)
        finally:
            process.kill()


def say(**values: object) -> None:
    """Say one line, from inside such a process."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()
