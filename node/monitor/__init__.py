"""The operator's sight of a swarm: status and watch."""
