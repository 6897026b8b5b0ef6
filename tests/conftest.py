"""What tests of several directories share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in child processes

import pytest

from node.model.folder import ModelFolder
from node.model.source import cache_dir, resolve


@pytest.fixture(scope="session")
def builtin_model() -> ModelFolder:
    """The built-in model, fetched into the user's cache by the first run."""
    return resolve(cache_dir=cache_dir())
