"""Parts of a node alone, without a network."""
