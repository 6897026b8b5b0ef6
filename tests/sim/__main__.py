"""python -m tests.sim --seeds 200: run seeds and say which of them break a promise, and which promise."""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes

from tests.sim.many import open_pool, run_many
from tests.sim.run import Outcome, run_seed


def main() -> int:
    """Exit status 1 if any seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--verbose", action="store_true", help="say what happens, when (with --seed)")
    options = parser.parse_args()
    if options.seed is not None:
        outcome = run_seed(options.seed, log=print if options.verbose else None)
        _tell(outcome)
        print(outcome)
        return bool(outcome.failures)
    began = time.perf_counter()
    failed = tokens = errors = 0
    with open_pool(options.jobs) as pool:
        for outcome in run_many(range(options.first, options.first + options.seeds), pool):
            failed += bool(outcome.failures)
            tokens += outcome.tokens
            errors += outcome.errors
            _tell(outcome)
    seconds = time.perf_counter() - began
    print(
        f"{options.seeds} seeds in {seconds:.1f} s ({options.seeds / seconds:.1f} a second):"
        f" {failed} failed; {tokens} tokens, {errors} generations ended in an error"
    )
    return bool(failed)


def _tell(outcome: Outcome) -> None:
    for failure in outcome.failures:
        print(f"seed {outcome.seed}: {failure}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
