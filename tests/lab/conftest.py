"""A lab for one test or one module, where namespaces can be made; else they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.forking import ForkingLab
from tests.netlab.lab import Lab, cannot


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with _made(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One lab for the tests of a module."""
    with _made(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture
def lines() -> None:
    """For a test whose lab has lines: they need more than namespaces."""
    if (reason := cannot()) is not None:
        pytest.skip(f"no lines: {reason}")


@contextmanager
def _made(folder: Path) -> Iterator[Lab]:
    if (reason := cannot(lines=False)) is not None:
        pytest.skip(f"no lab: {reason}")
    with ForkingLab(folder) as made:
        yield made


@pytest.fixture
def figure(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Say a figure in the output of the test run, whether or not pytest keeps the rest for itself."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")  # noqa: T201

    return say
