"""A Kademlia table that names the servers of a model revision, and nothing else."""
