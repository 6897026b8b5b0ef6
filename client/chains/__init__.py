"""Which chains a client takes, and what it remembers of peers."""
