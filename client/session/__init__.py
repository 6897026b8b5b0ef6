"""A client's session along a chain: its state, its hops, and what is done when hops fail."""
