"""Nodes that run for long: what they hold must not grow."""
