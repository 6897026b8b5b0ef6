"""Parts of a node by themselves, without a network."""
