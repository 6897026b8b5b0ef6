"""Dials: which addresses a node dials, how often, and the race between the addresses of one peer."""
