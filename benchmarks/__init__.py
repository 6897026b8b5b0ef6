"""Numbers, never asserted in CI.  `python -m benchmarks` lists the benchmarks; each has a name there."""
