"""Attacks on real nodes, each beside an honest client and newcomers: python -m tests.hostile."""
