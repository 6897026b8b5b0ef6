"""What an operator sees of a swarm."""
