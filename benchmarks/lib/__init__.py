"""The common parts of benchmarks: processes, the machine, files of results."""
