"""A model over a swarm of processes, next to the whole model in one process."""
