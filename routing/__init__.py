"""Decides about the swarm: pure functions over values.  No sockets, no clock, no torch."""
