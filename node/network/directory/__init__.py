"""The peers of the swarm: records, pings, and joining."""
