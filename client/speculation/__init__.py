"""Tokens that are guessed before the servers compute them, and checked by one step of several tokens."""
