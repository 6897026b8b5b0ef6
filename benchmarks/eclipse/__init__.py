"""Newcomers among attackers: whether they find the honest servers of a swarm."""
