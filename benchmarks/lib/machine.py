"""The machine of a measurement: the processor, the versions that matter, and the load by other programs."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

# The processor's flags that choose the kernels.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> dict[str, object]:
    """Processor, cores, versions and the day: plain values, for a file of figures."""
    cpu = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", cpu, re.MULTILINE)
    have = flags[1].split() if flags else []
    return {
        "cpu": name[1].strip() if name else platform.processor(),
        "cpu_flags": [flag for flag in FLAGS if flag in have],
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "raceme")},
        "day": datetime.now(UTC).date().isoformat(),
    }


class Elsewhere:
    """The share of the machine for other programs from now on, without this process and its children."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._ours = _busy_seconds(), _our_seconds()

    def share(self) -> float:
        """The share of all cores, 0 to 1.  Children that ended without a wait count as other programs."""
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        others = (_busy_seconds() - self._busy) - (_our_seconds() - self._ours)
        return round(min(max(others / seconds, 0.0), 1.0), 2)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _our_seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds
