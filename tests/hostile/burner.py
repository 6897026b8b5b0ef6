"""The control: a process that burns a share of a core and nothing else.  A worker of tests.hostile."""

from __future__ import annotations

import sys
import time

PERIOD_SECONDS = 0.02


def burn(share: float, seconds: float) -> None:
    """Be busy for `share` of each 20 ms, for `seconds`."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        while time.monotonic() < now + share * PERIOD_SECONDS:
            pass
        time.sleep(max(0.0, now + PERIOD_SECONDS - time.monotonic()))


if __name__ == "__main__":
    burn(float(sys.argv[1]), float(sys.argv[2]))
