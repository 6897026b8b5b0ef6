"""The folder of compiled kernels: one for each content of their sources, in the user's cache.

    kernels/<key>/      files of numba's, and a lock for each function

A key is a digest of the sources, of the compilers' versions and of the CPU.  So every copy of the same
sources (a clone, an image, an installation by pip) reads the same files, and other sources never do.
numba's own folders are named by the path of a source.

numba's files are pickles: to read one is to run it.  A folder that another user owns or may write to is not
used, and each process then compiles for itself, in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding
from numba.core.caching import CacheImpl, _CacheLocator

from node.config import ConfigError
from node.model.checkpoint.source import cache_dir

log = logging.getLogger("raceme")

HERE = Path(__file__).parents[1]
SOURCES = (
    "weights/compiling.py", "weights/kernels.py", "weights/low_rank_kernel.py", "weights/decode_kernels.py",
    "weights/argmax_head.py", "attention/stores.py", "attention/tiles.py", "attention/decode.py",
    "attention/prefill.py", "weights/panels/panel_kernels.py", "weights/panels/integer_panels.py",
    "weights/panels/order.py", "weights/panels/stripes.py", "weights/panels/bfloat16_panels.py",
)  # fmt: skip
KEPT_KEYS = 16  # of 1 to 2 MB each: states of the sources and machines that share a cache
DAY_SECONDS = 86_400.0  # a folder's last use is noted once a day


def key_of(contents: Sequence[bytes], compilers: Sequence[str]) -> str:
    """The name of a folder, 32 hexadecimal digits: other sources or compilers have another one."""
    digest = hashlib.sha256()
    for part in (*contents, *(each.encode() for each in compilers)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


@cache
def key() -> str:
    """Of the sources, the installed compilers, and this CPU as numba sees it."""
    features = numba.config.CPU_FEATURES
    return key_of(
        [(HERE / name).read_bytes() for name in SOURCES],
        [
            str(sys.implementation.cache_tag), platform.machine(), numba.__version__, llvmlite.__version__,
            numba.config.CPU_NAME or binding.get_host_cpu_name(),
            binding.get_host_cpu_features().flatten() if features is None else features,
        ],
    )  # fmt: skip


def root() -> Path | None:
    """NUMBA_CACHE_DIR, else `kernels` in the cache of models; None where the home folder is not known."""
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR)
    try:
        return cache_dir() / "kernels"
    except ConfigError:
        return None


def folder(above: Path | None, name: str) -> Path | None:
    """The folder `name` below `above`, made if it is not there; None where it cannot be used."""
    if above is None:
        return None
    try:
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = above / name
        try:
            found.mkdir(mode=0o700)
        except FileExistsError:
            pass
        else:
            remove_old(above)
        state = found.lstat()
        if fault := _fault(state):
            log.warning("compiled kernels in %s are not used: %s", found, fault)
            return None
        if abs(time.time() - state.st_mtime) > DAY_SECONDS:
            os.utime(found)
        return found if os.access(found, os.W_OK | os.X_OK) else None
    except OSError:
        return None


def remove_old(above: Path) -> None:
    """Remove the folders of keys that were unused for longest, all but KEPT_KEYS.

    A process with code from one of them has it in memory.
    """
    keys = [each for each in above.iterdir() if re.fullmatch(r"[0-9a-f]{32}", each.name)]
    for old in sorted(keys, key=lambda each: each.lstat().st_mtime, reverse=True)[KEPT_KEYS:]:
        shutil.rmtree(old, ignore_errors=True)


def forget(within: Path, function: Callable[..., Any]) -> None:
    """Remove a function's files, of which one cannot be read."""
    for path in within.glob(f"*{function.__name__}-*.nb[ic]"):
        path.unlink(missing_ok=True)


def _fault(state: os.stat_result) -> str:
    """Why a folder is not ours alone, or nothing."""
    if not stat.S_ISDIR(state.st_mode):
        return "this is no folder"
    if state.st_uid != os.geteuid():
        return f"the folder belongs to user {state.st_uid}"
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write there (mode {stat.S_IMODE(state.st_mode):o})"
    return ""


class _ByKey(_CacheLocator):  # type: ignore[misc]
    """Tells numba where the files of our functions lie."""

    def __init__(self, function: Callable[..., Any], within: Path) -> None:
        self._line = function.__code__.co_firstlineno
        self._within = within
        self._py_file, self._lineno = function.__code__.co_filename, self._line  # for a warning of numba's

    def get_cache_path(self) -> str:
        """The folder."""
        return str(self._within)

    def ensure_cache_path(self) -> None:
        """Make the folder again where another process has removed it."""
        self._within.mkdir(mode=0o700, exist_ok=True)

    def get_source_stamp(self) -> str:
        """The state of all sources."""
        return self._within.name

    def get_disambiguator(self) -> str:
        """The difference of two functions of one name in one file."""
        return str(self._line)

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _ByKey | None:
        """None, so that numba's own places are taken, for functions of others."""
        ours = Path(file).parent in {(HERE / name).parent for name in SOURCES}
        within = opened() if ours else None
        return None if within is None else cls(function, within)


def opened() -> Path | None:
    """This process's folder, or None: compile in memory."""
    return _opened(root())


@cache
def _opened(above: Path | None) -> Path | None:
    return folder(above, key())


CacheImpl._locator_classes.insert(0, _ByKey)
