"""`python -m tests.jumping_clock FILE MODULE ...`: the module, with a wrong wall clock.

FILE holds the seconds that are added to the time, and may change at any moment.  The monotonic clock stays as
it is: the system promises that it never jumps.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

OURS = {"client", "node", "routing", "tensor_codec"}


def main() -> None:
    """Run the module as `python -m` does."""
    file, module = Path(sys.argv[1]), sys.argv[2]
    true = time.time

    def wrong() -> float:
        return true() + float(file.read_text() or 0)

    time.time = wrong
    time.time_ns = lambda: int(wrong() * 1e9)
    ours = [name for name in sys.modules if name.partition(".")[0] in OURS]
    for name in ours:
        if name.startswith("node.model.cuda"):
            continue  # torch takes its operators once in a process; the folder reads no clock
        del sys.modules[name]  # of a fork: a default of a function may hold the right clock
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def set_clock(file: Path, seconds: float) -> None:
    """Let the clock jump; the file is never seen half written."""
    part = file.with_suffix(".part")
    part.write_text(str(seconds))
    os.replace(part, file)


if __name__ == "__main__":
    main()
