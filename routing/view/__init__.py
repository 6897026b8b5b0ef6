"""A peer's view of the swarm: records, how they spread, and which peers answer."""
