"""Benchmarks of the gateway and of its metrics."""
