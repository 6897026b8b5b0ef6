"""Adapters of others: who gives what, fetching by id, and giving one's own."""
