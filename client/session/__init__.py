"""A client's session along a chain: its state, its hops, and the repair after a hop's failure."""
