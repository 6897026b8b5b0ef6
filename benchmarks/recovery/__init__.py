"""Servers and clients that fail in the midst of generations."""
