"""Numbers, never asserted in CI.  `python -m benchmarks` lists the benchmarks by name."""
