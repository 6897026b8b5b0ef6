"""Adapters of a client: what they are made of, and how they come to the servers."""
