"""What several benchmarks use: processes, the machine, files of results."""
