"""The benchmark of recovery over links of its own, with forked nodes: run by `netns.command_inside`."""

from __future__ import annotations

import json
import sys

from benchmarks.recovery.recovery import measure, parse
from tests.forked import Forked

if __name__ == "__main__":
    json.dump(measure(parse(sys.argv[1:]), Forked), sys.stdout)
