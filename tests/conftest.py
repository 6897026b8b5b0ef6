"""What tests of several directories share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in child processes

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.source import cache_dir, resolve
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

settings.register_profile("raceme", deadline=None)  # a busy machine is no bug
settings.load_profile("raceme")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # Any: pytest-xdist's own types
    """Each test goes to the next free worker; those with real processes run one after the other, in one."""
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesInOneWorker(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith("tests/fault/") else nodeid

    return ProcessesInOneWorker(config, log)


@pytest.fixture(scope="session")
def builtin_model() -> ModelFolder:
    """The built-in model, fetched into the user's cache by the first run."""
    return resolve(cache_dir=cache_dir())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of six blocks with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path
